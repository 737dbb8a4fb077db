"""The sparsifying activation functions, one registry row each.

An activation turns inputs into act((x − b_dec) W_encᵀ + b_enc), in the form that is cheapest to
decode and to train through: `Latents`, a ragged code, or the dense one (n, d_sae).

To add one: a function or two here and a row in ACTIVATIONS, its name in `config.ActivationName`.
With `backward` the fused training step takes it; without, autograd does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import sae_kernels
from sae.coder.latents import Latents, SparseCode

if TYPE_CHECKING:
    from sae.coder.coder import SparseCoder
    from sae.config import CoderConfig


class CodeGradients(NamedTuple):
    """What a code's values pass on: dL/dpre_acts, and gradients of parameters of its own, by name.

    Losses on the code besides reconstruction and AuxK are part of both.
    """

    pre_acts: Tensor  # as the code's values
    parameters: Mapping[str, Tensor] = {}


class Prefixes(NamedTuple):
    """Dictionaries within the dictionary: the number of latents of each, and its loss's weight."""

    ends: Sequence[int]
    weights: Sequence[float]


@dataclass(frozen=True)
class Activation:
    """One activation function.

    Attributes:
        encode_training: the code of x (n, d_in). losses: names of those it trains with besides
            reconstruction. saelens_architecture: its name there.
        backward: what the fused training step needs: the gradients behind a sparse code, from
            dL/dvalues; None leaves the coder to autograd.
        prefixes: those whose reconstructions add up to the loss (Matryoshka); None: the whole.
    """

    encode_training: Callable[[SparseCoder, Tensor], SparseCode | Tensor]
    losses: tuple[str, ...]
    saelens_architecture: str
    backward: Callable[[SparseCoder, SparseCode, Tensor], CodeGradients] | None = None
    prefixes: Callable[[CoderConfig], Prefixes] | None = None


def encode_topk(coder: SparseCoder, x: Tensor) -> Latents:
    """Keep each token's k largest positive pre-activations.

    Source: Gao et al. 2024 (arXiv 2406.04093), eq. 1, with a ReLU after the selection.
    """
    values, indices = sae_kernels.encode_topk(
        x,
        coder.W_enc,
        coder.b_enc,
        coder.b_dec,
        k=coder.cfg.k,
        shadow=coder.enc_shadow,
        scratch=coder.scratch,
    )
    return Latents(values, indices)


def topk_backward(_: SparseCoder, code: SparseCode, grad_values: Tensor) -> CodeGradients:
    """Pass the gradient on where a latent fired: nothing moves those that were not selected."""
    return CodeGradients(grad_values.masked_fill(code.values <= 0, 0))


def encode_relu(coder: SparseCoder, x: Tensor) -> Tensor:
    """Return max(0, pre_acts), dense. Source: Bricken et al. 2023, Towards Monosemanticity."""
    return torch.relu((x - coder.b_dec) @ coder.W_enc.T + coder.b_enc)


ACTIVATIONS: dict[str, Activation] = {
    "topk": Activation(
        encode_topk, losses=("auxk",), saelens_architecture="topk", backward=topk_backward
    ),
    "relu": Activation(encode_relu, losses=("l1",), saelens_architecture="standard"),
}
