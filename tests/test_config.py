"""The configuration: its keys, its precedence, its errors."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from sae.config import Config, TrainConfig
from sae.configuration import (
    dotted_keys,
    flatten,
    from_command_line,
    from_flat,
    read_yaml,
    to_yaml,
)

KEYS_FILE = Path(__file__).parent / "config_keys.txt"


def test_keys_are_the_checked_in_list():
    """A new setting is a visible change: add it to config_keys.txt."""
    assert [key for key, _ in dotted_keys()] == KEYS_FILE.read_text().split()


def test_every_field_has_a_docstring():
    for section in dataclasses.fields(Config):
        (node,) = ast.parse(inspect.getsource(type(getattr(Config(), section.name)))).body
        assert isinstance(node, ast.ClassDef)
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                text = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else ""
                assert len(str(text)) > 20, f"{node.name}.{ast.unparse(field.target)}"


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        Config().coder.k = 3  # pyright: ignore


def test_defaults_then_yaml_then_command_line(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("coder:\n  k: 5\n  d_sae: 100\ntrain: {lr: 1}\ndata:\n  mask: [bos]\n")
    cfg = from_command_line([str(path), "--coder.k", "7", "--train.resume", "auto"], "sae train")
    assert (cfg.coder.k, cfg.coder.d_sae, cfg.train.resume) == (7, 100, "auto")
    assert cfg.train.lr == 1.0
    assert isinstance(cfg.train.lr, float)
    assert cfg.data.mask == ("bos",)
    assert cfg.train.batch_tokens == TrainConfig().batch_tokens
    assert cfg.run.folder == "runs/mine"


def test_yaml_round_trip():
    cfg = from_flat({"coder.k": 3, "data.mask": ["bos", "first"], "train.adam_betas": [0.5, 0.9]})
    path_text = to_yaml(cfg)
    assert "betas" in path_text
    import yaml

    from sae.configuration import _leaves

    assert from_flat(dict(_leaves(yaml.safe_load(path_text)))) == cfg


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"coder.kk": 1}, ValueError, r"got `coder.kk`. Did you mean `coder.k`"),
        ({"coder.activaton": "topk"}, ValueError, "Did you mean `coder.activation`"),
        ({"k": 1}, ValueError, "Did you mean `coder.k`"),
        ({"coder.k": 1.5}, TypeError, r"`coder.k` must be int; got 1.5"),
        ({"coder.k": True}, TypeError, "must be int"),
        ({"coder.activation": "topc"}, TypeError, r"did you mean 'topk'"),
        ({"coder.k": 64, "coder.d_sae": 32}, ValueError, r"got k=64, d_sae=32. Lower `coder.k`"),
        ({"coder.k": 0}, ValueError, r"`coder.k` must be in \[1"),
        ({"coder.prefixes": [8, 4], "coder.d_sae": 64}, ValueError, r"increase .* got \[8, 4\]"),
        ({"coder.prefixes": [8, 64], "coder.d_sae": 64}, ValueError, r"d_sae` − 1\]; got \[8, 64"),
        ({"coder.prefixes": [0, 8], "coder.d_sae": 64}, ValueError, "must increase and lie in"),
        ({"coder.random_prefixes": 64, "coder.d_sae": 64}, ValueError, "must be below"),
        ({"coder.prefixes": [8], "coder.random_prefixes": 3}, ValueError, "Give one of the two"),
        ({"coder.detach_prefixes": True}, ValueError, "`coder.detach_prefixes` needs prefixes"),
        ({"coder.threshold_init": 0.2}, ValueError, "is a setting of jumprelu; got 'topk'"),
        (
            {"train.freeze_decoder": True, "train.step": "fused"},
            ValueError,
            "`train.freeze_decoder` must be off",
        ),
        (
            {"train.freeze_decoder": True, "train.resample_every_tokens": 1000},
            ValueError,
            "`train.freeze_decoder` must be off",
        ),
        (
            {"train.freeze_decoder": True, "coder.activation": "matching_pursuit"},
            ValueError,
            "`train.freeze_decoder` must be off",
        ),
        (
            {"coder.activation": "relu", "coder.target_l0": 65.0, "coder.d_sae": 64},
            ValueError,
            r"got target_l0=65.0, d_sae=64. Lower `coder.target_l0`",
        ),
        ({"coder.target_l0": 5.0}, ValueError, r"relu, gated, jumprelu; got 'topk'.*`coder.k` is"),
        ({"coder.activation": "relu", "coder.signed": True}, ValueError, "is a setting of topk"),
        (
            {"coder.activation": "relu", "coder.sparsity_loss": "step"},
            ValueError,
            "must be one of l1, p_norm, tanh for relu; got 'step'",
        ),
        ({"coder.sparsity_loss": "l1"}, ValueError, "is a setting of relu, gated, jumprelu"),
        (
            {"coder.activation": "jumprelu", "coder.sparsity_loss": "quadratic"},
            ValueError,
            "`coder.target_l0` must be given with",
        ),
        (
            {"coder.activation": "jumprelu", "coder.sparsity_loss": "step", "coder.target_l0": 5.0},
            ValueError,
            "must be quadratic for jumprelu",
        ),
        ({"train.sort_latents_every_steps": 3}, ValueError, "needs Matryoshka prefixes"),
        ({"coder.multi_k": 32}, ValueError, "`coder.multi_k` must be above `coder.k`; got 32"),
        ({"coder.multi_k": 64, "coder.refine_step": 0.3}, ValueError, "left out where"),
        ({"coder.threshold_rate": 0.0}, ValueError, r"must be in \(0, 1\]"),
        ({"coder.tilt": -1.0}, ValueError, "`coder.tilt` must not be negative"),
        ({"coder.bandwidth": 0.0}, ValueError, "`coder.bandwidth` must be positive"),
        (
            {"coder.activation": "matching_pursuit", "stream.normalisation": "whiten"},
            ValueError,
            "whose encoder is its decoder; got 'whiten'",
        ),
        ({"coder.d_sae": 8, "coder.expansion_factor": 2, "coder.k": 1}, ValueError, "one of the"),
        ({"train.tokens": 10, "train.batch_tokens": 20}, ValueError, "at least train.batch_tokens"),
        ({"train.warmup_fraction": 0.9, "train.decay_fraction": 0.5}, ValueError, "lie in"),
        ({"train.lr": -1.0}, ValueError, "`train.lr` must be positive"),
        ({"data.held_out_fraction": 0.0}, ValueError, "held_out_fraction"),
        ({"data.context_size": 1}, ValueError, "at least 2"),
        ({"stream.refill_fraction": 1.5}, ValueError, "refill_fraction"),
        ({"stream.reuse": 0}, ValueError, "`stream.reuse` must be positive"),
    ],
)
def test_bad_settings(values: dict, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        from_flat(values)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--coder.activation relu --coder.k 7", "`coder.k` does nothing .* got 7. Its L0 is"),
        ("--coder.bandwidth 0.2", "`coder.bandwidth` does nothing for `coder.activation: topk`"),
        ("--coder.activation relu --coder.threshold_rate 0.5", "`coder.threshold_rate` does noth"),
    ],
)
def test_what_does_nothing_for_the_activation_is_told(flags: str, message: str):
    with pytest.warns(UserWarning, match=message):
        from_command_line(flags.split(), "sae train")


def test_what_one_of_several_activations_uses_is_not_idle():
    from_command_line(["--fleet.activation", "topk,relu", "--coder.k", "7"], "sae train")


def test_bad_yaml(tmp_path: Path):
    with pytest.raises(ValueError, match="is not there"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1, ")
    with pytest.raises(ValueError, match="must be YAML"):
        read_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold sections"):
        read_yaml(tmp_path / "list.yaml")


def test_command_line_suggests_the_near_key():
    with pytest.raises(ValueError, match=r"Did you mean `coder\.d_sae`"):
        from_command_line(["--coder.d_see", "3"], "sae train")


def test_flag_forms():
    cfg = from_command_line(["--data.context-size", "64", "--coder.d-sae=32"], "sae train")
    assert cfg.data.context_size == 64
    assert cfg.coder.d_sae == 32


@pytest.mark.parametrize(
    ("flags", "is_frozen"),
    [
        (["--train.freeze_decoder"], True),
        (["--train.freeze_decoder", "true"], True),
        (["--train.freeze_decoder=true"], True),
        (["--train.no-freeze-decoder"], False),
        (["--train.freeze_decoder", "false"], False),
        (["--train.freeze-decoder=false"], False),
    ],
)
def test_switches_take_yamls_words(flags: list[str], is_frozen: bool, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"train: {{freeze_decoder: {str(not is_frozen).lower()}}}")
    cfg = from_command_line([str(path), *flags, "--coder.k", "3"], "sae train")
    assert cfg.train.freeze_decoder == is_frozen
    assert cfg.coder.k == 3


@pytest.mark.parametrize("flags", [["--train.lr", "null"], ["--train.lr=null"]])
def test_null_takes_a_value_back(flags: list[str], tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr: 1}")
    assert from_command_line([str(path), *flags], "sae train").train.lr is None


def test_yamls_words_stay_in_text():
    flags = ["--data.exclude_tokens", "true", "null", "--model.name", "null"]
    cfg = from_command_line(flags, "sae train")
    assert cfg.data.exclude_tokens == ("true", "null")
    assert cfg.model.name == "null"


def test_excluded_tokens_are_ids_and_texts(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text('data:\n  exclude_tokens: [13, "5", "\\n"]\n')
    assert from_flat(read_yaml(path)).data.exclude_tokens == (13, "5", "\n")
    flags = ["--data.exclude_tokens", "13", " the", "\n"]
    cfg = from_command_line([str(path), *flags], "sae train")
    assert cfg.data.exclude_tokens == (13, " the", "\n")
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(cfg))
    assert from_flat(read_yaml(again)) == cfg
    with pytest.raises(TypeError, match="exclude_tokens"):
        from_flat({"data.exclude_tokens": [True]})


def test_flatten_names_every_key():
    assert list(flatten(Config())) == [key for key, _ in dotted_keys()]


def test_help_needs_no_torch():
    code = (
        "import sys; from sae.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "--coder.k INT" in done.stdout


def test_yamls_surprises_are_undone():
    """YAML 1.1 reads 1e-3 as text and an unquoted no as False."""
    import yaml

    tree = yaml.safe_load("lr: 1e-3\nmixed_precision: no")
    cfg = from_flat({f"train.{key}": value for key, value in tree.items()})
    assert cfg.train.lr == 1e-3
    assert cfg.train.mixed_precision == "no"
    with pytest.raises(TypeError, match=r"`train\.lr` must be"):
        from_flat({"train.lr": "fast"})


@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.99, 0.999]])
def test_a_pair_has_two_members(betas: list[float]):
    with pytest.raises(TypeError, match="adam_betas"):
        from_flat({"train.adam_betas": betas})


@pytest.mark.parametrize(
    "flags",
    [
        ["--fleet.k", "16,32", "--fleet.lr=1e-3,2e-3", "--coder.prefixes", "4,8"],
        ["--fleet.k", "16", "32", "--fleet.lr", "1e-3", "2e-3", "--coder.prefixes", "4", "8"],
    ],
    ids=["commas", "spaces"],
)
def test_lists_are_given_with_commas_or_spaces(flags: list[str]):
    cfg = from_command_line(
        [*flags, "--data.mask", "bos,first", "--coder.d_sae", "64"], "sae train"
    )
    assert cfg.fleet.k == (16, 32)
    assert cfg.fleet.lr == (1e-3, 2e-3)
    assert cfg.coder.prefixes == (4, 8)
    assert cfg.data.mask == ("bos", "first")
    assert cfg.coder.d_sae == 64


def test_commas_in_free_text_stay():
    flags = ["--data.exclude_tokens", "a,b", ",", "--fleet.hookpoint", "layers.1,layers.2:in"]
    cfg = from_command_line([*flags, "--model.hookpoint", "x,y"], "sae train")
    assert cfg.data.exclude_tokens == ("a,b", ",")
    assert cfg.fleet.hookpoint == ("layers.1", "layers.2:in")
    assert cfg.model.hookpoint == "x,y"
