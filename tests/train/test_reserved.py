"""Rows that training never sees set the thresholds of what is saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sae
from sae.configuration import from_command_line
from sae.train import run

RESERVED = 200
FLAGS = ["--stream.reuse", "4", "--train.lr", "0.02"]
BATCHTOPK = [*FLAGS, "--coder.activation", "batchtopk"]
JUMPRELU = [*FLAGS, "--coder.activation", "jumprelu", "--coder.target_l0", "4"]
JUMPRELU += ["--train.step", "autograd", "--coder.k", "32"]


def trained(path: Path, name: str, *flags: str) -> Path:
    folder = str(path.parent / name)
    return run(from_command_line([str(path), *flags, "--run.folder", folder], "sae train"))


@torch.no_grad()
def l0_on_reserved(folder: Path) -> float:
    """Return the saved dictionary's L0 on the first rows of the buffer in the last checkpoint."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    rows = load_file(newest / "rank_0.safetensors")["source.lane_0.buffer.0"][:RESERVED]
    return float((sae.load(folder / "final").encode(rows) != 0).double().sum(1).mean())


def test_each_member_of_a_fleet_is_set_by_its_own_hookpoint(tiny_config: Path):
    """The second place of the rows: as the run alone, which reads the same text."""
    aside = [*BATCHTOPK, "--stream.reserved_tokens", str(RESERVED)]
    places = ["--fleet.hookpoint", "model.layers.0,model.layers.1", "--model.hookpoint", ""]
    fleet = trained(tiny_config, "fleet", *aside, *places)
    alone = trained(tiny_config, "alone", *aside, "--model.hookpoint", "model.layers.1")
    member = next(path for path in fleet.iterdir() if path.name.endswith("layers.1"))
    one, other = sae.load(alone / "final").threshold, sae.load(member / "final").threshold
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


@pytest.mark.parametrize("flags", [BATCHTOPK, JUMPRELU], ids=["batchtopk", "jumprelu"])
def test_the_l0_on_rows_set_aside_is_what_was_asked_for(tiny_config: Path, flags: list[str]):
    aside = ["--stream.reserved_tokens", str(RESERVED)]
    plain = trained(tiny_config, "plain", *flags)
    folder = trained(tiny_config, "aside", *flags, *aside)
    assert l0_on_reserved(folder) == pytest.approx(4, abs=2 / RESERVED)
    assert abs(l0_on_reserved(plain) - 4) > 0.05
    # A run that was stopped ends with the same thresholds.
    whole = sae.load(folder / "final")
    for part in (sorted((folder / "checkpoints").iterdir())[-1], folder / "final"):
        shutil.rmtree(part)
    trained(tiny_config, "aside", *flags, *aside, "--train.resume", "auto")
    again = sae.load(folder / "final")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
