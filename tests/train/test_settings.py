"""Every setting of model, text and stream changes what it says it changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import sae
from sae.configuration import from_command_line
from sae.train import run
from sae.train.tracking import read_metrics


def trained(path: Path, name: str, *flags: str) -> Path:
    folder = str(path.parent / name)
    return run(from_command_line([str(path), *flags, "--run.folder", folder], "sae train"))


def weights(folder: Path) -> torch.Tensor:
    return sae.load(folder).W_enc


@pytest.fixture
def baseline(tiny_config: Path) -> Path:
    return trained(tiny_config, "baseline")


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.hookpoint", "model.layers.1:in"],
        ["--model.hookpoint", "model.layers.0.mlp"],
        ["--model.dtype", "bfloat16"],
        ["--data.context_size", "24"],
        ["--data.contexts", "document"],
        ["--data.bos", "context"],
        ["--data.bos", "none"],
        ["--data.mask", "special"],
        ["--data.exclude_tokens", " the"],
        ["--data.max_norm_ratio", "1.1"],
        ["--data.held_out_fraction", "0.3"],
        ["--stream.buffer_tokens", "900"],
        ["--stream.reuse", "2"],
        ["--stream.refill_fraction", "0.25"],
        ["--stream.sequences_per_forward", "3"],
        ["--stream.dtype", "bfloat16"],
        ["--stream.normalisation", "none"],
        ["--stream.calibration_sequences", "3"],
        ["--run.seed", "1"],
    ],
    ids=lambda flags: " ".join(flags).removeprefix("--"),
)
def test_each_setting_changes_the_outcome(tiny_config: Path, baseline: Path, flags: list[str]):
    other = trained(tiny_config, "other", *flags)
    assert not torch.equal(weights(other), weights(baseline))


def test_settings_that_only_keep_or_show_change_no_number(tiny_config: Path, baseline: Path):
    flags = ["--train.keep_checkpoints", "3", "--train.checkpoint_every_steps", "5"]
    other = trained(tiny_config, "other", *flags, "--train.log_every_steps", "8")
    assert torch.equal(weights(other), weights(baseline))
    kept = [p.name[-2:] for p in sorted((other / "checkpoints").iterdir())]
    assert kept == ["15", "20", "24"]
    assert [row["step"] for row in read_metrics(other)] == [8, 16, 24]


def test_the_norm_filter_drops_outliers_and_is_remembered(tiny_config: Path):
    folder = trained(tiny_config, "filtered", "--data.max_norm_ratio", "1.1")
    max_norm = sae.load(folder).metadata["max_norm"]
    from safetensors.torch import load_file

    newest = sorted((folder / "checkpoints").iterdir())[-1]
    buffer = load_file(newest / "rank_0.safetensors")["source.lane_0.buffer.0"]
    assert isinstance(max_norm, float)
    assert buffer.norm(dim=1).max() <= max_norm * (1 + 1e-6)
    assert buffer.norm(dim=1).median() * 1.1 == pytest.approx(max_norm, rel=0.15)
    state = json.loads((newest / "rank_0.json").read_text())
    assert state["lanes"]["0"]["max_norm"] == max_norm


@pytest.fixture
def told_thrice(tmp_path: Path, tiny_text_file: Path, tiny_lm_folder: Path) -> list[str]:
    """Flags of the tiny text as text, as token ids and as conversations that come out as it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    model = shutil.copytree(tiny_lm_folder, tmp_path / "chat_model")
    tokenizer.save_pretrained(model)
    texts = [json.loads(line)["text"] for line in tiny_text_file.read_text().splitlines()]
    rows = [
        {
            "body": text,
            "ids": tokenizer(text, add_special_tokens=False)["input_ids"],
            "talk": [{"from": "human", "value": text[:9]}, {"from": "gpt", "value": text[9:]}],
        }
        for text in texts
    ]
    path = tmp_path / "thrice.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data.source", str(path), "--model.name", str(model)]
    return [*flags, "--data.held_out_fraction", "1e-9"]


def test_text_conversations_and_token_ids_train_alike(tiny_config: Path, told_thrice: list[str]):
    """Hashes differ, and with them the held-out part, so that hardly anything is held out here."""
    found = [
        weights(
            trained(
                *(tiny_config, content, *told_thrice),
                *("--data.content", content, "--data.column", column),
            )
        )
        for content, column in (("text", "body"), ("tokens", "ids"), ("chat", "talk"))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_token_ids_that_the_model_does_not_read_are_refused_before_work(
    tiny_config: Path, tiny_lm_folder: Path, tmp_path: Path
):
    """The model's vocabulary counts, and not that of a tokenizer that has been given a token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_folder)
    tokenizer.add_tokens(["<more>"])
    model = shutil.copytree(tiny_lm_folder, tmp_path / "model")
    tokenizer.save_pretrained(model)
    path = tmp_path / "ids.jsonl"
    path.write_text("\n".join(json.dumps({"tokens": [5, 6, 290 + i]}) for i in range(11)))
    flags = ["--data.source", str(path), "--data.content", "tokens", "--model.name", str(model)]
    with pytest.raises(ValueError, match=r"in \[0, 300\); document 10 .* holds 300"):
        trained(tiny_config, "bad", *flags)
    assert not list((tmp_path / "bad").glob("checkpoints/*"))


def test_training_never_sees_held_out_documents(tiny_config: Path):
    from sae.stream.opening import open_model

    cfg = from_command_line([str(tiny_config)], "sae train")
    opened = open_model(cfg, torch.device("cpu"))
    train = opened.contexts("train")
    seen = {i for batch in train.batches(8) for i in batch.document_ids.unique().tolist()}
    held = {i for batch in opened.held_out() for i in batch.document_ids.unique().tolist()}
    assert len(held - {-1}) > 5
    assert (seen & held) - {-1} == set()
    assert (seen | held) - {-1} == set(range(300))
