"""The sparsifying activation functions, one registry row each.

An activation turns inputs into act((x − b_dec) W_encᵀ + b_enc), in the form that is cheapest to
decode and to train through: `Latents` or the dense code (n, d_sae).

To add one: a function or two here and a row in ACTIVATIONS, its name in `config.ActivationName`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import sae_kernels
from sae.coder.latents import Latents

if TYPE_CHECKING:
    from sae.coder.coder import SparseCoder


@dataclass(frozen=True)
class Activation:
    """One activation function: its code, the losses it trains with, its SAELens name."""

    encode_training: Callable[[SparseCoder, Tensor], Latents | Tensor]
    losses: tuple[str, ...]
    saelens_architecture: str


def encode_topk(coder: SparseCoder, x: Tensor) -> Latents:
    """Keep each token's k largest positive pre-activations.

    Source: Gao et al. 2024 (arXiv 2406.04093), eq. 1, with a ReLU after the selection.
    """
    values, indices = sae_kernels.encode_topk(
        x, coder.W_enc, coder.b_enc, coder.b_dec, k=coder.cfg.k
    )
    return Latents(values, indices)


def encode_relu(coder: SparseCoder, x: Tensor) -> Tensor:
    """Return max(0, pre_acts), dense. Source: Bricken et al. 2023, Towards Monosemanticity."""
    return torch.relu((x - coder.b_dec) @ coder.W_enc.T + coder.b_enc)


ACTIVATIONS: dict[str, Activation] = {
    "topk": Activation(encode_topk, losses=("auxk",), saelens_architecture="topk"),
    "relu": Activation(encode_relu, losses=("l1",), saelens_architecture="standard"),
}
