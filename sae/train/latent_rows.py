"""Replacing and reordering latents in all of the trainer's state at once.

A latent is a row of every tensor but b_dec's, W_skip's and scalars': of the coder's parameters and
buffers, of the optimiser's state with the scales of 8-bit moments, of averages, and of the dead
counters.
A step that keeps copies of weights must be told afterwards: `Step.weights_changed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.coder import OF_NO_LATENT
from sae.train.distributed import sum_over_ranks
from sae.train.state import LAST_FIRED, TrainState, coder_tensors


def tensors_by_latent(state: TrainState) -> dict[str, Tensor]:
    """Return the live tensors (d_sae, …) of `state`, by name."""
    d_sae, found = state.coder.d_sae, {}
    groups = {
        "coder": coder_tensors(state.coder),
        "optimiser": state.optimiser.tensors(),
        "ema": state.ema.tensors if state.ema else {},
    }
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if tensor.ndim and name.split(".")[0] not in OF_NO_LATENT:
                assert len(tensor) == d_sae, f"{group}.{name} must have a row a latent"
                found[f"{group}.{name}"] = tensor.detach()
    return {**found, LAST_FIRED: state.dead.last_fired_at}


def is_sorting_due(step: int, every: int | None) -> bool:
    """Return whether latents are sorted before the step with 0-based index `step`."""
    return every is not None and step > 0 and step % every == 0


@torch.no_grad()
def sort_latents_(state: TrainState) -> None:
    """Let latents stand by how often they fired since this was last done, the commonest first.

    So Matryoshka's prefixes hold the commonest. Source: D. Chanin's LISTA-Matryoshka for
    SynthSAEBench, which sorts at each step by a moving average.
    """
    assert state.dead.counts is not None, "`train.sort_latents_every_steps` counts"
    counts = sum_over_ranks(state.dead.counts)
    reorder_latents_(state, torch.argsort(counts, descending=True, stable=True))
    state.dead.counts.zero_()


@torch.no_grad()
def reorder_latents_(state: TrainState, order: Tensor) -> None:
    """Let latent i be what latent `order[i]` was, in place; order: a permutation, (d_sae) int64.

    The function that is trained stays the same, its code is permuted. All processes call this with
    the same order.
    """
    for tensor in tensors_by_latent(state).values():
        tensor.copy_(tensor[order])
    # A new tensor, not a changed one: whoever keeps the list looks whether it is the same.
    state.dead.indices = torch.argsort(order)[state.dead.indices].sort().values


@torch.no_grad()
def reset_latents_(state: TrainState, latents: Tensor) -> None:
    """Begin anew with `latents` (n) int64, whose weights were replaced.

    The optimiser and the averages forget them; by the counters they fired just now. All processes
    call this with the same latents.
    """
    state.optimiser.reset_latents_(state.coder, latents)
    if state.ema:
        state.ema.reset_latents_(state.coder, latents)
    state.dead.last_fired_at[latents] = state.tokens_seen
    state.dead.refresh(state.tokens_seen)
