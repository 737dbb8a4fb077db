"""Learning rate and run length as arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sae.config import TrainConfig
from sae.train.schedule import derived_lr, lr_at, n_steps, resolve

CFG = TrainConfig(tokens=1000, batch_tokens=10, lr=2.0, warmup_fraction=0.1, decay_fraction=0.4)


def test_lr_rises_holds_and_falls():
    rates = [lr_at(step, CFG) for step in range(n_steps(CFG))]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10:60] == [2.0] * 50
    assert rates[60:] == pytest.approx([2.0 * (100 - s) / 40 for s in range(60, 100)])
    assert all(rate > 0 for rate in rates)


def test_no_warmup_and_no_decay_is_constant():
    cfg = replace(CFG, warmup_fraction=0.0, decay_fraction=0.0)
    assert {lr_at(step, cfg) for step in range(100)} == {2.0}


def test_a_short_run_learns_faster_and_a_wide_one_slower():
    assert derived_lr(2**14, 10_000) == pytest.approx(2e-4)
    assert derived_lr(2**14, 100_000) == pytest.approx(2e-4)
    assert derived_lr(2**16, 100_000) == pytest.approx(1e-4)
    assert derived_lr(2**14, 2_500) == pytest.approx(4e-4)
    assert derived_lr(2**10, 10) <= 3e-3


def test_resolve_fills_what_is_left_open_and_keeps_what_is_given():
    resolved = resolve(TrainConfig(tokens=1000, batch_tokens=10), 64, torch.device("cpu"))
    assert resolved.lr == derived_lr(64, 100)
    assert resolved.dead_after_tokens == 100
    assert resolved.mixed_precision == "no"
    assert resolved.checkpoint_every_steps == 10
    given = replace(CFG, dead_after_tokens=5, checkpoint_every_steps=3)
    given = replace(given, mixed_precision="bf16")
    assert resolve(given, 64, torch.device("cpu")) == given
