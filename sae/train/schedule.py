"""How long a run is and how fast it learns: each derived setting of `TrainConfig`."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

import torch

from sae.coder.step_values import StepValues
from sae.config import Config, TrainConfig

LR_AT_2_14_LATENTS = 2e-4
LONG_RUN_STEPS = 10_000
MAX_LR = 3e-3


def n_steps(cfg: TrainConfig) -> int:
    """Return the number of optimiser steps: whole batches that fit into `tokens`."""
    return cfg.tokens // cfg.batch_tokens


def derived_lr(d_sae: int, steps: int) -> float:
    """Return a peak learning rate for Adam from the width and the length of the run.

    lr = 2e-4 · √(2¹⁴ / d_sae) · √(10,000 / steps), the last factor at least 1, the whole at most
    3e-3: wider dictionaries learn slower, and a short run must move its weights as far in fewer
    steps.
    Source: Gao et al. 2024, figure 3, for the first two factors; the third and the cap are ours,
    from the sweep in docs/log.md.
    """
    width_rule = LR_AT_2_14_LATENTS * (2**14 / d_sae) ** 0.5
    return min(width_rule * max(1.0, LONG_RUN_STEPS / steps) ** 0.5, MAX_LR)


def lr_at(step: int, cfg: TrainConfig) -> float:
    """Return the learning rate of the step with 0-based index `step`: rise, hold, fall."""
    assert cfg.lr is not None, "resolve the configuration first"
    steps = n_steps(cfg)
    warmup, decay = cfg.warmup_fraction * steps, cfg.decay_fraction * steps
    rising = (step + 1) / warmup if warmup >= 1 else 1.0
    falling = (steps - step) / decay if decay >= 1 else 1.0
    return cfg.lr * min(1.0, rising, falling)


def values_at(step: int, cfg: Config) -> StepValues:
    """Return what the schedules say of the coder at the step with 0-based index `step`."""
    fixed = StepValues.fixed(cfg.coder)
    if not cfg.coder.random_prefixes:
        return fixed
    assert cfg.coder.d_sae is not None, "resolve the configuration first"
    seed = f"prefixes of step {step}, seed {cfg.run.seed}"
    return replace(fixed, prefixes=drawn_prefixes(cfg.coder.random_prefixes, cfg.coder.d_sae, seed))


def drawn_prefixes(n: int, d_sae: int, seed: str) -> tuple[int, ...]:
    """Return up to n different ends of prefixes, uniform in their logarithm, and d_sae."""
    draw = random.Random(seed).random
    return tuple(sorted({min(int(d_sae ** draw()), d_sae - 1) for _ in range(n)} | {d_sae}))


def derived_precision(device: torch.device) -> Literal["no", "bf16"]:
    """Return bf16 on a GPU that multiplies it natively, else no."""
    is_native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if is_native else "no"


def resolve(cfg: TrainConfig, d_sae: int, device: torch.device) -> TrainConfig:
    """Return `cfg` with every derived value filled in."""
    steps = n_steps(cfg)
    is_derived = cfg.mixed_precision == "auto"
    return replace(
        cfg,
        lr=cfg.lr or derived_lr(d_sae, steps),
        mixed_precision=derived_precision(device) if is_derived else cfg.mixed_precision,
        dead_after_tokens=cfg.dead_after_tokens or max(1, min(10_000_000, cfg.tokens // 10)),
        checkpoint_every_steps=cfg.checkpoint_every_steps or max(1, steps // 10),
    )
