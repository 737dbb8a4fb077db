"""Learning rate and run length as arithmetic."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sae.coder.step_values import StepValues
from sae.config import CoderConfig, Config, TrainConfig
from sae.train.schedule import derived_lr, lr_at, n_steps, resolve, values_at

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
    given = replace(given, mixed_precision="bf16", lr_decay="linear")
    assert resolve(given, 64, torch.device("cpu")) == given


STEPS = Config(
    coder=CoderConfig(d_sae=64, k=4, activation="batchtopk"),
    train=replace(CFG, k_start=24, k_anneal_fraction=0.25),
)


def test_the_rate_falls_along_a_cosine_or_not_at_all():
    cosine = [lr_at(step, replace(CFG, lr_decay="cosine")) for step in range(100)]
    linear = [lr_at(step, CFG) for step in range(100)]
    assert cosine[:61] == linear[:61]
    assert cosine[80] == pytest.approx(linear[80])  # halfway
    assert cosine[70] > linear[70]
    assert 0 < cosine[99] < linear[99]
    assert cosine[60:] == sorted(cosine[60:], reverse=True)
    held = [lr_at(step, replace(CFG, lr_decay="none")) for step in range(100)]
    assert held[:10] == linear[:10]
    assert set(held[10:]) == {2.0}
    # Signum's average decays in its place.
    assert [lr_at(step, replace(CFG, optimizer="signum")) for step in range(100)] == held


def test_k_goes_down_linearly_and_stays():
    ks = [values_at(step, STEPS).k for step in range(100)]
    assert ks[0] == 24
    assert ks[:26] == sorted(ks[:26], reverse=True)
    assert max(a - b for a, b in pairwise(ks)) == 1
    assert ks[25:] == [4] * 75
    assert ks[12] == pytest.approx(24 - 20 * 12 / 25, abs=0.5)
    up = replace(STEPS, train=replace(STEPS.train, k_start=1))
    assert [values_at(step, up).k for step in (0, 25, 99)] == [1, 4, 4]


def test_sparsity_rises_and_p_falls():
    coder = CoderConfig(d_sae=64, activation="relu", sparsity_loss="p_norm")
    cfg = Config(coder=coder, train=replace(CFG, sparsity_warmup_fraction=0.2, p_end=0.5))
    values = [values_at(step, cfg) for step in range(100)]
    factors = [v.sparsity for v in values]
    assert factors[:20] == pytest.approx([step / 20 for step in range(20)])
    assert set(factors[20:]) == {1.0}
    assert {v.p for v in values[:20]} == {1.0}
    assert values[99].p == pytest.approx(0.5)
    steps = [a.p - b.p for a, b in pairwise(values[20:])]
    assert steps == pytest.approx([0.5 / (0.8 * 99)] * 79, rel=0.3)
    assert all(step > 0 for step in steps)


def test_without_schedules_the_values_are_the_configuration_s():
    cfg = Config(coder=CoderConfig(d_sae=64, k=4, prefixes=(8,)), train=CFG)
    for step in (0, 1, 50, 99):
        assert values_at(step, cfg) == StepValues(k=4, prefixes=(8, 64))


def test_a_fine_tuning_has_a_rate_of_its_own_behind_the_usual_schedule():
    cfg = replace(CFG, tokens=1250, model_loss="kl", model_loss_fraction=0.2)
    cfg = replace(cfg, model_loss_lr_share=0.1)
    rates = [lr_at(step, cfg) for step in range(n_steps(cfg))]
    assert rates[:100] == [lr_at(step, CFG) for step in range(100)]
    assert rates[100:] == pytest.approx([0.2 * (125 - s) / 25 for s in range(100, 125)])
    whole = replace(cfg, model_loss_fraction=1.0)
    assert [lr_at(step, whole) for step in range(125)] == [
        lr_at(step, replace(whole, model_loss="none")) for step in range(125)
    ]
