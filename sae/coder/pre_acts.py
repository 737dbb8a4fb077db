"""From x to pre-activations, once or with a refinement."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.coder import cross_layer
from sae.coder.latents import SparseCode, dense_if_cheaper

if TYPE_CHECKING:
    from sae.coder.coder import SparseCoder

Select = Callable[[Tensor, bool], SparseCode | Tensor]


def pre_activations(coder: SparseCoder, x: Tensor) -> Tensor:
    """Return (x − b_dec) W_encᵀ + b_enc, (n, d_sae), multiplied in the shadow's dtype if any.

    b_dec is not taken from x where another place is written.
    """
    if coder.n_layers is not None:
        return cross_layer.pre_activations(x, coder.W_enc, coder.b_enc, coder.n_layers)
    if coder.enc_shadow is None:
        return torch.addmm(coder.b_enc, centred(coder, x), coder.W_enc.T)
    rows = (x - coder.b_dec).to(coder.enc_shadow.dtype)
    return torch.addmm(coder.b_enc.to(rows.dtype), rows, coder.enc_shadow.T).to(x.dtype)


def centred(coder: SparseCoder, x: Tensor) -> Tensor:
    """Return what W_enc is multiplied with: x (n, d_in), less b_dec where that is x's own."""
    return x - coder.b_dec if coder.writes_what_it_reads else x


def pre_activations_of(coder: SparseCoder, x: Tensor, latents: Tensor) -> Tensor:
    """Return the pre-activations (n, m) of some latents, (m) int64; b_dec is held constant."""
    if coder.n_layers is not None:
        return pre_activations(coder, x)[:, latents]
    x = x - coder.b_dec.detach() if coder.writes_what_it_reads else x
    return x @ coder.W_enc[latents].T + coder.b_enc[latents]


def refined(coder: SparseCoder, x: Tensor, select: Select) -> tuple[SparseCode | Tensor, Tensor]:
    """Return the code of x after one refinement, and the pre-activations it was selected from.

    h ← h + η (x − x_hat) W_encᵀ, x_hat being what a first code of h reconstructs: one step of
    iterative shrinkage, with the encoder's own weights. Gradients pass both selections.
    Source: Gregor and LeCun 2010, "Learning Fast Approximations of Sparse Coding", eq. 4, with the
    encoder in the place of the transposed decoder and η = `coder.refine_step`.
    """
    pre_acts = pre_activations(coder, x)
    first = dense_if_cheaper(select(pre_acts, True), len(x), coder.d_sae)
    left = x - coder.decode(first)
    refined_pre_acts = torch.addmm(pre_acts, left, coder.W_enc.T, alpha=coder.cfg.refine_step)
    return select(refined_pre_acts, False), refined_pre_acts
