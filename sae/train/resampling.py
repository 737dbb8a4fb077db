"""Resampling: dead latents begin anew where the dictionary reconstructs badly.

For each dead latent an input is drawn with a probability ∝ its squared loss. Its direction, from
b_dec, becomes the decoder row; the encoder row is the same direction, of 0.2 times the mean norm of
living encoder rows; biases become 0; the optimiser forgets the latent.
Source: Bricken et al. 2023, "Towards Monosemanticity", Neuron resampling. Ours: no input is drawn
twice; directions are from b_dec, which the encoder subtracts too; a threshold becomes 0.2 times the
mean of living ones, as pre-activations do; losses are those of the step's own batch; and where
latents compete for k places the factor is 1, as with 0.2 the new ones hardly ever win (on a toy of
400 latents, resampled to 185 that fire with 0.2, to 265 with 1; never resampled, 208 do).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.coder import OF_NO_LATENT
from sae.config import HAVE_K, Config
from sae.train.distributed import gathered_rows, max_over_ranks
from sae.train.latent_rows import reset_latents_
from sae.train.schedule import n_steps
from sae.train.state import TrainState

ENCODER_SHARE = 0.2
SHARE_WHERE_LATENTS_COMPETE = 1.0


def is_due(step: int, cfg: Config) -> bool:
    """Return whether latents are resampled before the step with 0-based index `step`."""
    every = cfg.train.resample_every_tokens
    if every is None or step == 0 or step > cfg.train.resample_until_fraction * n_steps(cfg.train):
        return False
    return step % max(1, every // cfg.train.batch_tokens) == 0


@torch.no_grad()
def resample_(state: TrainState, x: Tensor, seed: int) -> Tensor:
    """Replace dead latents by directions of this step's inputs x (n, d_in) of every process.

    All processes call this together and choose alike. Returns the latents, (m) int64, at most as
    many as there are inputs of loss above 0.
    """
    coder = state.coder
    dead = _dead_latents(state)
    pooled = gathered_rows(x)
    losses = (pooled - coder(pooled)).square().sum(-1).double().cpu()
    n = min(dead.numel(), int((losses > 0).sum()))
    if n == 0:
        return dead[:0]
    generator = torch.Generator().manual_seed(hash_of(seed, state.step))
    chosen = torch.multinomial(losses.square(), n, generator=generator)
    latents = dead[:n]
    _replace_(state, latents, pooled[chosen.to(x.device)] - coder.b_dec)
    reset_latents_(state, latents)
    return latents


def hash_of(seed: int, step: int) -> int:
    """Return the generator's seed, another for every seed and step."""
    return (seed * 0x9E3779B1 + step) & 0x7FFFFFFFFFFFFFFF


def encoder_share(activation: str) -> float:
    """Return a new encoder row's norm in units of the mean norm of living ones."""
    return SHARE_WHERE_LATENTS_COMPETE if activation in HAVE_K else ENCODER_SHARE


def _dead_latents(state: TrainState) -> Tensor:
    """Return all dead latents, the longest dead first; every process's counts are taken in."""
    dead = state.dead
    max_over_ranks(dead.last_fired_at)
    since = state.tokens_seen - dead.last_fired_at
    indices = (since >= dead.dead_after_tokens).nonzero().squeeze(1)
    return indices[torch.argsort(since[indices], descending=True, stable=True)]


def _replace_(state: TrainState, latents: Tensor, inputs: Tensor) -> None:
    """Write the weights of `latents` (m), from inputs less b_dec (m, d_in)."""
    coder = state.coder
    is_alive = torch.ones(coder.d_sae, dtype=torch.bool, device=latents.device)
    is_alive[latents] = False
    alive = is_alive if bool(is_alive.any()) else ~is_alive
    share = encoder_share(coder.cfg.activation)
    unit = inputs / inputs.norm(dim=1, keepdim=True).clamp_min(1e-12)
    for name, parameter in coder.named_parameters():
        rows = parameter.detach()
        if name == coder.decoder_name:
            rows[latents] = unit.to(rows.dtype)
        elif name == "W_enc":
            norm = rows[alive].norm(dim=1).mean()
            rows[latents] = (share * norm * unit).to(rows.dtype)
        elif name == "threshold":
            rows[latents] = share * rows[alive].mean()
        elif name not in OF_NO_LATENT:
            rows[latents] = 0
