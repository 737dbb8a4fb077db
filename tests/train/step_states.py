"""Training states and steps at a toy size, for the tests of the steps."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sae.coder.sites import Sites
from sae.config import Config
from sae.configuration import from_flat
from sae.stream.arrays import open_source
from sae.train.run import resolve
from sae.train.state import TrainState
from sae.train.steps import Step, make_step
from sae.train.trainer import make_state

D_IN, BATCH = 16, 256
SMALL = {"coder.d_sae": 64, "coder.k": 4, "coder.k_aux": 8, "train.dead_after_tokens": 2048}


def resolved(settings: dict[str, Any]) -> Config:
    """Return the resolved configuration of a toy run with `settings`, by dotted key."""
    flat = {**SMALL, "train.tokens": 400 * BATCH, "train.batch_tokens": BATCH, **settings}
    return resolve(from_flat(flat, Config()), Sites((D_IN,)), None, torch.device("cpu"))


def make(
    activations: Tensor, step: str, *, cpu: bool = True, **settings: Any
) -> tuple[TrainState, Step]:
    """Return a state before its first step, and the step."""
    cfg = resolved({"train.step": step, **settings})
    accelerator = Accelerator(cpu=cpu)
    source = open_source(activations, seed=0, rank=0, world_size=1)
    state = make_state(cfg, source, accelerator)
    return state, make_step(cfg, state, accelerator)


def inputs_of(state: TrainState, n_micro: int, n_tokens: int) -> list[Tensor]:
    """Return the next micro-batches, in training units."""
    normaliser, device = state.calibration.normaliser, state.coder.W_enc.device
    return [normaliser.apply(state.source.next_batch(n_tokens).to(device)) for _ in range(n_micro)]


def train(
    activations: Tensor, step: str, n_steps: int, **settings: Any
) -> tuple[TrainState, list[dict[str, float]]]:
    """Return the state after `n_steps`, and a row of metrics a step."""
    state, run = make(activations, step, **settings)
    n_micro, rows = settings.get("train.grad_accumulation_steps", 1), []
    for i in range(n_steps):
        if i % 5 == 0:
            state.dead.refresh(state.tokens_seen)
        run(inputs_of(state, n_micro, BATCH // n_micro), 1e-3 * min(1.0, (i + 1) / 10))
        state.step += 1
        rows.append({**state.metrics.compute(), "n_dead": state.dead.indices.numel()})
        state.metrics.clear()
    return state, rows


@torch.no_grad()
def copy_training_(target: TrainState, source: TrainState) -> None:
    """Give `target` the parameters, the moments and the counts of `source`, in place."""
    for name, parameter in target.coder.named_parameters():
        parameter.copy_(source.coder.get_parameter(name))
    for name, moment in target.optimiser.tensors().items():
        moment.copy_(source.optimiser.tensors()[name])
    target.dead.last_fired_at.copy_(source.dead.last_fired_at)
