"""Coders of every kind, trained: what their settings change, whether they go on, where L0 ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from coder_variants import VARIANTS

import sae
from sae.train.tracking import read_metrics

QUICK = {"d_sae": 48, "k": 4, "batch_tokens": 256, "progress": False, "step": "autograd"}
SHORT = {**QUICK, "tokens": 2_560, "lr": 1e-2, "dead_after_tokens": 512, "dead_refresh_steps": 1}


def fit(activations: torch.Tensor, *, by: str = "autograd", **settings: Any) -> sae.SparseCoder:
    return sae.fit(activations, **{**SHORT, **settings, "step": by})


def l0(coder: sae.SparseCoder, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((coder.encode(x) != 0).double().sum(1).mean())


BATCHTOPK = {"activation": "batchtopk"}
RELU = {"activation": "relu"}
JUMPRELU = {"activation": "jumprelu"}
QUADRATIC = {**JUMPRELU, "sparsity_loss": "quadratic", "target_l0": 3.0}
MATRYOSHKA = {**BATCHTOPK, "prefixes": (4, 11)}


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, {"signed": True}),
        ({}, {"multi_k": 9}),
        ({"multi_k": 9}, {"multi_k_coefficient": 2.0}),
        ({}, {"refine_step": 0.3}),
        ({}, {"tilt": 0.5}),
        ({}, {"activation": "batchtopk"}),
        ({}, {"activation": "jumprelu"}),
        ({}, {"activation": "gated"}),
        ({}, {"activation": "matching_pursuit"}),
        (BATCHTOPK, {"prefixes": (4, 11)}),
        (BATCHTOPK, {"random_prefixes": 3}),
        (MATRYOSHKA, {"prefixes": (7, 30)}),
        (MATRYOSHKA, {"detach_prefixes": True}),
        (RELU, {"sparsity_loss": "tanh"}),
        (RELU, {"sparsity_loss": "p_norm"}),
        (RELU, {"sparsity_coefficient": 2.0}),
        (RELU, {"target_l0": 3.0}),
        ({**JUMPRELU, "threshold_init": 6.0}, {"k_aux": 8}),
        ({**RELU, "sparsity_loss": "tanh"}, {"tanh_scale": 1.0}),
        (JUMPRELU, {"bandwidth": 1.0}),
        (JUMPRELU, {"threshold_init": 0.5}),
        (JUMPRELU, {"ste_to_encoder": True}),
        (QUADRATIC, {"target_l0": 5.0}),
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_each_setting_changes_the_outcome(
    activations: torch.Tensor, settings: dict[str, Any], change: dict[str, Any]
):
    plain, other = fit(activations, **settings), fit(activations, **{**settings, **change})
    assert not torch.equal(plain.W_dec, other.W_dec)


def test_the_rate_of_the_running_threshold_changes_where_it_ends(activations: torch.Tensor):
    slow, fast = (fit(activations, **BATCHTOPK, threshold_rate=rate) for rate in (0.01, 0.5))
    assert torch.equal(slow.W_dec, fast.W_dec)
    assert float(slow.threshold[0]) != float(fast.threshold[0])


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "matryoshka_gated"])
def test_a_run_that_was_stopped_goes_on(activations: torch.Tensor, tmp_path: Path, variant: str):
    """Ten steps at once, and the same ten with a stop behind the sixth: equal to the bit."""
    settings = {**VARIANTS[variant], "checkpoint_every_steps": 2, "keep_checkpoints": 9}
    whole = fit(activations, folder=str(tmp_path / "whole"), **settings)
    folder = tmp_path / "stopped"
    fit(activations, folder=str(folder), **settings)
    for step in ("08", "10"):
        remove(folder / f"checkpoints/step_000000{step}")
    remove(folder / "final")
    resumed = fit(activations, folder=str(folder), resume="auto", **settings)
    for (name, one), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert read_metrics(folder)[-1]["loss"] == read_metrics(tmp_path / "whole")[-1]["loss"]


def remove(folder: Path) -> None:
    import shutil

    assert folder.exists()
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": "batchtopk"},
        {"activation": "jumprelu", "target_l0": 4.0},
        {"activation": "relu", "target_l0": 4.0},
        {"activation": "gated", "target_l0": 4.0},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_the_saved_dictionary_has_the_l0_that_was_asked_for(
    activations: torch.Tensor, tmp_path: Path, settings: dict[str, Any]
):
    coder = fit(activations, **settings, tokens=200_000, lr=4e-3)
    coder.save(str(tmp_path / "d"))
    assert l0(sae.load(tmp_path / "d"), activations) == pytest.approx(4, rel=0.05)


def test_random_prefixes_are_drawn_by_seed_and_step():
    from sae.train.schedule import drawn_prefixes

    draws = [drawn_prefixes(5, 1000, f"{step}") for step in range(400)]
    assert draws == [drawn_prefixes(5, 1000, f"{step}") for step in range(400)]
    assert len(set(draws)) > 390
    for ends in draws:
        assert ends[-1] == 1000
        assert list(ends) == sorted(set(ends))
        assert ends[0] >= 1
        assert 2 <= len(ends) <= 6
    inner = torch.tensor([float(end) for ends in draws for end in ends[:-1]])
    assert float(inner.log().median()) == pytest.approx(math.log(1000) / 2, rel=0.1)
