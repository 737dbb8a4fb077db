"""A whole run on a language model, by command line: what it leaves, and what bad input gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from user import run_sae

import sae
from sae.configuration import from_command_line, from_flat, read_run_config
from sae.stream.source import NonFiniteActivationsError
from sae.train import run
from sae.train.tracking import read_metrics


def configured(path: Path, *flags: str) -> sae.Config:
    return from_command_line([str(path), *flags], "sae train")


def test_a_run_leaves_a_folder_that_says_everything(tiny_config: Path):
    folder = run(configured(tiny_config))
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "checkpoints",
        "final",
    }
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(3, 25, 3))
    assert set(rows[0]) == {
        *("step", "tokens", "loss", "reconstruction", "auxk", "fvu", "l0"),
        *("dead_share", "lr", "tokens_per_second", "wait_share"),
        *("same_document_pairs", "pairs_over_buffer", "pairs_over_text"),
        *("masked_padding", "masked_bos", "masked_first", "masked_special"),
    }
    assert all(0 <= row["wait_share"] <= 1 for row in rows)
    assert 1 / 32 < rows[-1]["masked_bos"] < 0.1  # one a context of 32 tokens, and one a document
    assert rows[-1]["masked_padding"] == rows[-1]["masked_first"] == 0
    assert rows[-1]["fvu"] < rows[0]["fvu"]
    resolved = read_run_config(folder)
    assert resolved.train.lr is not None
    assert resolved.coder.d_sae == 48
    environment = json.loads((folder / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    coder = sae.load(folder)
    assert coder.metadata["hook_name"] == "model.layers.1"
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    assert torch.equal(sae.load(newest).b_dec, coder.b_dec)


def test_checkpoints_are_in_raw_units(tiny_config: Path):
    """The saved biases are those of training, divided by the input scale."""
    from safetensors.torch import load_file

    folder = run(configured(tiny_config))
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    training = load_file(newest / "trainer.safetensors")
    scale = training["normaliser.factor"]
    assert abs(scale - 1) > 0.01
    torch.testing.assert_close(sae.load(newest).b_dec * scale, training["coder.b_dec"])
    assert torch.equal(sae.load(newest).W_enc, training["coder.W_enc"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.hookpoint", "model.layerz.1"], "model.layers"),
        (["--model.hookpoint", "model.layers.9"], "model.layers"),
        (["--model.name", "/nowhere/model"], "/nowhere/model"),
        (["--data.source", "/nowhere/text.jsonl"], "/nowhere/text.jsonl"),
        (["--stream.buffer_tokens", "1000000"], "too few"),
        (["--coder.kk", "3"], "Did you mean `coder.k`"),
        (["--train.grad_accumulation_steps", "3"], "must be a multiple"),
        (["--data.context_size", "4096"], "must be at most what"),
        (["--run.device", "cuda"], "needs a GPU"),
        (["--model.name", ""], "`model.name` must name"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_input_ends_before_training(tiny_config: Path, flags: list[str], message: str):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(configured(tiny_config, *flags))
    assert not list(tiny_config.parent.glob("run/checkpoints/*"))


def test_an_empty_source_is_named(tiny_config: Path, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        run(configured(tiny_config, "--data.source", str(tmp_path / "empty.jsonl")))


def test_too_little_text_says_by_how_much_and_what_would_do(tiny_config: Path):
    with pytest.raises(ValueError, match=r"give only about \d+ kept tokens, \d+ too few"):
        run(configured(tiny_config, "--stream.buffer_tokens", "100000"))


def test_another_run_in_the_folder_is_left_alone(tiny_config: Path):
    folder = run(configured(tiny_config))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"already holds a run.*resume auto"):
        run(configured(tiny_config))
    with pytest.raises(ValueError, match=r"coder\.k was 4, now 5"):
        run(configured(tiny_config, "--train.resume", "auto", "--coder.k", "5"))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_folder_of_other_things_is_refused(tiny_config: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("")
    with pytest.raises(ValueError, match="holds other files"):
        run(configured(tiny_config, "--run.folder", str(tmp_path / "other")))


def broken_model(folder: Path, target: Path) -> Path:
    """A copy of the tiny model whose second layer produces NaN."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_nan_activations_name_the_hookpoint(
    tiny_config: Path, tiny_lm_folder: Path, tmp_path: Path
):
    broken = broken_model(tiny_lm_folder, tmp_path / "broken")
    with pytest.raises(NonFiniteActivationsError, match=r"`model.layers.1`.*NaN"):
        run(configured(tiny_config, "--model.name", str(broken)))


def test_a_run_on_shards_loads_no_model_and_resumes_exactly(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from sae.stream import opening
    from sae.stream.harvest import harvest

    shards = harvest(configured(tiny_config, "--harvest.folder", str(tmp_path / "shards")))
    monkeypatch.setattr(opening, "load_language_model", lambda *_: pytest.fail("the model"))
    flags = ["--stream.shards", str(shards), "--stream.resident_tokens", "500"]
    whole = run(configured(tiny_config, *flags, "--run.folder", str(tmp_path / "whole")))
    folder = run(configured(tiny_config, *flags))
    assert torch.equal(sae.load(folder).W_enc, sae.load(whole).W_enc)
    shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])
    shutil.rmtree(folder / "final")
    folder = run(configured(tiny_config, *flags, "--train.resume", "auto"))
    assert torch.equal(sae.load(folder).W_enc, sae.load(whole).W_enc)
    assert sae.load(folder).metadata["hook_name"] == "model.layers.1"
    rows = read_metrics(folder)
    assert rows[-1]["fvu"] < rows[0]["fvu"]


def test_the_models_have_a_device_of_their_own(tiny_config: Path):
    from sae.stream.opening import model_device

    cfg = configured(tiny_config, "--model.device", "cpu")
    assert model_device(cfg, torch.device("meta")) == torch.device("cpu")
    beside = configured(tiny_config)
    assert model_device(beside, torch.device("meta")) == torch.device("meta")
    far = configured(tiny_config, "--model.device", "cuda:99")
    with pytest.raises(RuntimeError, match=r"`model.device` cuda:99 needs a GPU"):
        run(far)
    with pytest.raises(ValueError, match=r"must be auto, cpu, cuda or cuda:N; got 'gpu'"):
        from_flat({"model.device": "gpu"})


def test_nan_in_mid_run_names_the_step_and_keeps_the_checkpoint(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
):
    import sae.stream.reader as reader

    honest, calls = reader.capture, []

    def poisoned(module, hookpoints, tokens):
        captured = honest(module, hookpoints, tokens)
        calls.append(1)
        if len(calls) > 25:
            captured[hookpoints[0]][0, 5] = float("nan")
        return captured

    monkeypatch.setattr(reader, "capture", poisoned)
    with pytest.raises(NonFiniteActivationsError, match=r"at step \d+: activations of `model"):
        run(configured(tiny_config))
    saved = sorted((tiny_config.parent / "run/checkpoints").iterdir())
    assert saved
    assert torch.isfinite(sae.load(saved[-1]).W_enc).all()


def test_a_run_without_learning_stops_before_it_overwrites(tiny_config: Path):
    with pytest.raises(NonFiniteActivationsError, match="must be finite"):
        run(configured(tiny_config, "--train.lr", "1e30"))
    for saved in (tiny_config.parent / "run").glob("checkpoints/step_*"):
        assert torch.isfinite(sae.load(saved).W_enc).all()


def test_errors_on_the_command_line_are_clear(tiny_config: Path):
    for flags, message in [
        (["--coder.k", "99"], "`coder.k` must be in [1, `coder.d_sae`]; got k=99"),
        (["--coder.kk", "9"], "error: every key must be a setting"),
        (["--coder.k", "many"], "many"),
        (["--model.hookpoint", "nowhere"], "error: "),
    ]:
        done = run_sae("train", tiny_config, *flags)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert run_sae("trian").returncode == 2
    assert "sae train CONFIG.yaml" in run_sae("--help").stdout


def test_trackers_receive_the_rows(tiny_config: Path):
    folder = run(configured(tiny_config, "--run.trackers", "tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("fvu")] == list(range(3, 25, 3))


def test_wandb_receives_the_rows(tiny_config: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run(configured(tiny_config, "--run.trackers", "wandb"))
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert (folder / "wandb_id.txt").read_text()


def test_yaml_of_the_run_is_what_the_next_run_reads(tiny_config: Path, tmp_path: Path):
    """A run's config.yaml reproduces it, bit for bit."""
    folder = run(configured(tiny_config))
    again = run(configured(folder / "config.yaml", "--run.folder", str(tmp_path / "again")))
    assert torch.equal(sae.load(again).W_enc, sae.load(folder).W_enc)
    assert yaml.safe_load((again / "config.yaml").read_text())["coder"]["k"] == 4


def test_a_run_that_failed_before_its_first_checkpoint_leaves_the_folder_free(tiny_config: Path):
    """What the message advises can be done: the same folder, another setting."""
    with pytest.raises(ValueError, match="too few"):
        run(configured(tiny_config, "--stream.buffer_tokens", "100000"))
    assert (run(configured(tiny_config)) / "final").exists()


def test_a_file_in_the_folders_place_is_refused(tiny_config: Path, tmp_path: Path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run(configured(tiny_config, "--run.folder", str(tmp_path / "taken")))


def test_dtypes_are_resolved(tiny_config: Path):
    resolved = read_run_config(run(configured(tiny_config)))
    assert resolved.model.dtype != "auto"
    assert resolved.stream.dtype == resolved.model.dtype


def test_the_saved_token_count_is_that_of_the_checkpoint(tiny_config: Path):
    folder = run(configured(tiny_config))
    counts = [
        sae.load(path).metadata["sae_training_tokens"]
        for path in [*sorted((folder / "checkpoints").iterdir()), folder / "final"]
    ]
    assert counts == [18 * 128, 24 * 128, 24 * 128]
