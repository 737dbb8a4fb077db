"""How long a run is, how fast it learns, and what changes meanwhile: all by a step's number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from sae.coder.step_values import StepValues
from sae.config import Config, DecayName, OptimizerName, TrainConfig

LR_AT_2_14_LATENTS = 2e-4
LONG_RUN_STEPS = 10_000
MAX_LR = 3e-3
SIGNUM_LR_AT_2_14_LATENTS = 5e-3


def n_steps(cfg: TrainConfig) -> int:
    """Return the number of optimiser steps: whole batches that fit into `tokens`."""
    return cfg.tokens // cfg.batch_tokens


def derived_lr(d_sae: int, steps: int, optimizer: OptimizerName = "adam") -> float:
    """Return a peak learning rate from the width and the length of the run.

    lr = 2e-4 · √(2¹⁴ / d_sae) · √(10,000 / steps), the last factor at least 1, the whole at most
    3e-3: wider dictionaries learn slower, and a short run must move its weights as far in fewer
    steps. Muon's updates are scaled to Adam's size, so the rule is the same. Signum's is
    5e-3 · √(2¹⁴ / d_sae), at most 3e-3, however long the run: its average does the decaying.
    Source: Gao et al. 2024, figure 3, for the first two factors; the third and the cap are ours,
    from the sweep in docs/log.md. Muon: Liu et al. 2025 (arXiv 2502.16982), §2.2. Signum: the
    default of EleutherAI's sparsify 1.3.3; the cap is ours.
    """
    if optimizer == "signum":
        return min(SIGNUM_LR_AT_2_14_LATENTS * (2**14 / d_sae) ** 0.5, MAX_LR)
    width_rule = LR_AT_2_14_LATENTS * (2**14 / d_sae) ** 0.5
    return min(width_rule * max(1.0, LONG_RUN_STEPS / steps) ** 0.5, MAX_LR)


def lr_at(step: int, cfg: TrainConfig) -> float:
    """Return the learning rate of the step with 0-based index `step`: rise, hold, fall.

    A fine-tuning by the model's loss comes behind that, and falls from a rate of its own.
    """
    assert cfg.lr is not None, "resolve the configuration first"
    steps = first_of_fine_tuning(cfg)
    if step >= steps:
        left = (n_steps(cfg) - step) / (n_steps(cfg) - steps)
        return cfg.lr * cfg.model_loss_lr_share * left
    warmup, decay = cfg.warmup_fraction * steps, cfg.decay_fraction * steps
    rising = (step + 1) / warmup if warmup >= 1 else 1.0
    left = (steps - step) / decay if decay >= 1 else 1.0
    falling = DECAYS[cfg.lr_decay or derived_decay(cfg.optimizer)](min(1.0, left))
    return cfg.lr * min(1.0, rising, falling)


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
    "none": lambda _: 1.0,
}
"""The share of the peak rate by the share of the decay that is left."""


def derived_decay(optimizer: OptimizerName) -> DecayName:
    """Return how the learning rate falls where nothing else is asked for."""
    return "none" if optimizer == "signum" else "linear"


def values_at(step: int, cfg: Config) -> StepValues:
    """Return what the schedules say of the coder at the step with 0-based index `step`.

    Source of the falling exponent: Karvonen et al. 2024 (arXiv 2408.00113), §4.2.
    """
    fixed = replace(
        StepValues.fixed(cfg.coder),
        k=k_at(step, cfg),
        sparsity=risen(step, cfg.train.sparsity_warmup_fraction * n_steps(cfg.train)),
        p=p_at(step, cfg.train),
        reconstruction=reconstruction_at(step, cfg.train),
    )
    if not cfg.coder.random_prefixes:
        return fixed
    assert cfg.coder.d_sae is not None, "resolve the configuration first"
    seed = f"prefixes of step {step}, seed {cfg.run.seed}"
    return replace(fixed, prefixes=drawn_prefixes(cfg.coder.random_prefixes, cfg.coder.d_sae, seed))


def k_at(step: int, cfg: Config) -> int:
    """Return the active latents a token: from k_start, linearly, to the coder's k."""
    start, end = cfg.train.k_start, cfg.coder.k
    if start is None:
        return end
    share = risen(step, cfg.train.k_anneal_fraction * n_steps(cfg.train))
    return round(start + (end - start) * share)


def first_with_model_loss(cfg: TrainConfig) -> int:
    """Return the 0-based index of the first step with a model's loss; behind the last: none."""
    share = 0.0 if cfg.model_loss == "none" else cfg.model_loss_fraction
    return n_steps(cfg) - round(share * n_steps(cfg))


def first_of_fine_tuning(cfg: TrainConfig) -> int:
    """Return the 0-based index of the first step that fine-tunes by a model's loss what steps
    without it have found; behind the last: there is none."""
    first = first_with_model_loss(cfg)
    return first if first > 0 else n_steps(cfg)


def reconstruction_at(step: int, cfg: TrainConfig) -> float:
    """Return the weight of the reconstruction's loss."""
    return cfg.reconstruction_weight if step >= first_with_model_loss(cfg) else 1.0


def p_at(step: int, cfg: TrainConfig) -> float:
    """Return the p_norm's exponent: 1 until the warm-ups are over, p_end at the last step."""
    if cfg.p_end is None:
        return 1.0
    last = n_steps(cfg) - 1
    start = max(cfg.warmup_fraction, cfg.sparsity_warmup_fraction) * last
    return 1 - (1 - cfg.p_end) * (risen(step - start, last - start) if step > start else 0.0)


def risen(step: float, steps: float) -> float:
    """Return the share of `steps` that is over; all of it where there is less than one."""
    return min(1.0, step / steps) if steps >= 1 else 1.0


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
        lr=cfg.lr or derived_lr(d_sae, steps, cfg.optimizer),
        lr_decay=cfg.lr_decay or derived_decay(cfg.optimizer),
        mixed_precision=derived_precision(device) if is_derived else cfg.mixed_precision,
        dead_after_tokens=cfg.dead_after_tokens or max(1, min(10_000_000, cfg.tokens // 10)),
        checkpoint_every_steps=cfg.checkpoint_every_steps or max(1, steps // 10),
    )
