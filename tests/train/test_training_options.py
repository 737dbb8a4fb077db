"""Optimisers, schedules and care for dead latents in whole runs: each changes one, and goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.train.tracking import read_metrics

SHORT = {"d_sae": 48, "k": 4, "batch_tokens": 256, "progress": False, "step": "autograd"}
SHORT |= {"tokens": 2_560, "lr": 1e-2, "dead_after_tokens": 512, "dead_refresh_steps": 2}
RELU = {"activation": "relu"}
FAR = {"activation": "jumprelu", "threshold_init": 6.0}
RESAMPLING = {"k": 1, "d_sae": 200, "resample_every_tokens": 768}


def fit(activations: torch.Tensor, **settings: Any) -> sae.SparseCoder:
    return sae.fit(activations, **{**SHORT, **settings})


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, {"optimizer": "muon"}),
        ({}, {"optimizer": "signum"}),
        ({"lr": None}, {"optimizer": "signum"}),
        ({}, {"lr_decay": "cosine"}),
        ({}, {"lr_decay": "none"}),
        ({}, {"adam_moments": "8bit"}),
        ({}, {"adam_moments": "bf16"}),
        ({}, {"k_start": 16}),
        ({"step": "fused"}, {"k_start": 16}),
        ({"k_start": 16}, {"k_anneal_fraction": 0.8}),
        (RELU, {"sparsity_warmup_fraction": 0.5}),
        ({**RELU, "sparsity_loss": "p_norm"}, {"p_end": 0.5}),
        ({}, {"ema_decay": 0.5}),
        ({"k": 1, "d_sae": 200}, {"resample_every_tokens": 768}),
        (RESAMPLING, {"resample_until_fraction": 0.1}),
        (RESAMPLING, {"seed": 1}),
        (FAR, {"dead_penalty": 1e-3}),
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_each_setting_changes_the_outcome(
    activations: torch.Tensor, settings: dict[str, Any], change: dict[str, Any]
):
    plain, other = fit(activations, **settings), fit(activations, **{**settings, **change})
    assert not torch.equal(plain.W_enc, other.W_enc)


@pytest.mark.parametrize(
    "settings",
    [{**FAR, "threshold_init": 1.5}, {"k": 2, "d_sae": 200}],
    ids=["jumprelu", "topk"],
)
def test_resampling_brings_dead_latents_back(activations: torch.Tensor, settings: dict[str, Any]):
    settings = {"tokens": 25_600, "k_aux": 0, "lr": 3e-3, "dead_after_tokens": 2_048, **settings}
    fired = [
        int((fit(activations, **settings, **each).encode(activations) != 0).any(0).sum())
        for each in ({}, {"resample_every_tokens": 2_560})
    ]
    assert fired[1] > 1.1 * fired[0] + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "muon", "grad_clip_norm": 1.0},
        {"optimizer": "signum", "lr": 1e-3},
        {"adam_moments": "8bit", "ema_decay": 0.7, "grad_accumulation_steps": 2},
        {**RESAMPLING, "k_start": 8, "k_anneal_fraction": 0.9},
        {**RESAMPLING, "step": "fused", "adam_moments": "8bit", "mixed_precision": "bf16"},
    ],
    ids=["muon", "signum", "ema", "resampling", "resampling, fused"],
)
def test_a_run_that_was_stopped_goes_on(
    activations: torch.Tensor, tmp_path: Path, settings: dict[str, Any]
):
    """Ten steps at once, and the same ten with a stop behind the sixth: equal to the bit.

    Latents are resampled before the fourth and the seventh step, the first of those resumed.
    """
    settings = {"resample_until_fraction": 1.0, **settings}
    settings |= {"checkpoint_every_steps": 2, "keep_checkpoints": 9}
    whole = fit(activations, folder=str(tmp_path / "whole"), **settings)
    folder = tmp_path / "stopped"
    fit(activations, folder=str(folder), **settings)
    for path in ("checkpoints/step_00000008", "checkpoints/step_00000010", "final"):
        shutil.rmtree(folder / path)
    resumed = fit(activations, folder=str(folder), resume="auto", **settings)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert read_metrics(folder)[-1]["loss"] == read_metrics(tmp_path / "whole")[-1]["loss"]
    saved = sae.load(folder / "final").state_dict()
    for name in ours:
        assert torch.equal(saved[name], ours[name]), name
