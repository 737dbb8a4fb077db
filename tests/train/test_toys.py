"""The toys' configurations find what the papers' figures say can be found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from user import ROOT, run_here


def metrics(config: str, folder: Path, *settings: object) -> dict[str, Any]:
    """Train a configuration of configs/worlds as a user does, and measure it."""
    path = ROOT / "configs" / "worlds" / f"{config}.yaml"
    for words in (["train", path, "--run.folder", folder, *settings], ["eval", folder]):
        done = run_here(*words)
        assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())["metrics"]


@pytest.mark.slow
def test_random_prefixes_find_parents_beside_their_children(tmp_path: Path):
    found = metrics("matryoshka_toy", tmp_path / "with")
    assert found["parent_recall_child_on"] > 0.995
    assert found["parent_recall_child_off"] > 0.995
    assert found["mcc"] > 0.965
    assert found["fvu"] < 0.02


@pytest.mark.slow
def test_without_prefixes_children_absorb_their_parents(tmp_path: Path):
    """The trap: the better reconstruction is that of the dictionary that lost the parents."""
    words = ("--coder.random_prefixes", 0, "--train.tokens", 300_000)
    plain = metrics("matryoshka_toy", tmp_path / "plain", *words)
    assert plain["parent_recall_child_on"] < 0.8 < plain["parent_recall_child_off"]
    assert plain["fvu"] < 0.002


@pytest.mark.slow
def test_the_directions_of_a_toy_model_are_found(tmp_path: Path):
    assert metrics("toy_model", tmp_path / "toy")["mcc"] > 0.9985
