"""How badly a code reconstructs: the whole, its Matryoshka prefixes, a second code with more.

With ℓ_i(x_hat) = ‖x_i − x_hat_i‖² / variance, and prefixes of m_1 < … < m_P = d_sae latents:
  reconstruction = mean over tokens and prefixes of ℓ_i(x_hat of the prefix)
  multi_topk     = mean over tokens of ℓ_i(x_hat of the wider code)

`variance` is a constant, the mean squared distance of activations from their mean on the
calibration sample: with it the loss of a batch is the mean of its parts', however the batch is
split over micro-batches and processes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sae.coder.coder import SparseCoder
from sae.coder.latents import SparseCode, dense_if_cheaper
from sae.coder.step_values import StepValues


def reconstruct(
    coder: SparseCoder, code: SparseCode | Tensor, x: Tensor, values: StepValues, variance: float
) -> tuple[Tensor, Tensor]:
    """Return the residual (n, d_out) of the whole dictionary, and the loss over all prefixes.

    x: what the code is to write (`SparseCoder.target`), in an sae what was encoded.
    """
    code = dense_if_cheaper(code, len(x), coder.d_sae)
    if not values.prefixes:
        residuals = [x - coder.decode(code)]
    elif isinstance(code, Tensor):
        residuals = _of_dense(coder, code, x, values.prefixes)
    else:
        residuals = _of_sparse(coder, code, x, values.prefixes)
    errors = [mean_squared(residual, coder.cfg.tilt) for residual in residuals]
    return residuals[-1], torch.stack(errors).mean() / variance


def _of_dense(coder: SparseCoder, code: Tensor, x: Tensor, ends: tuple[int, ...]) -> list[Tensor]:
    """Return what each prefix leaves over, the whole last: each a product more than the one before.

    Detached, a prefix sees the one before it as a constant, all but the whole.
    Source: Bussmann et al. 2025 (arXiv 2503.17547), eq. 4; detaching after D. Chanin's
    LISTA-Matryoshka for SynthSAEBench.
    """
    widths = [end - start for start, end in pairwise((0, *ends))]
    parts = list(zip(code.split(widths, 1), coder.W_dec.split(widths), strict=True))
    left, residuals = x - coder.b_dec, []
    is_detached = coder.cfg.detach_prefixes
    for latents, rows in parts[:-1] if is_detached else parts:
        before = residuals[-1].detach() if is_detached and residuals else (residuals or [left])[-1]
        residuals.append(torch.addmm(before, latents, rows, alpha=-1))
    if is_detached:
        residuals.append(torch.addmm(left, code, coder.W_dec, alpha=-1))
    return residuals


def _of_sparse(
    coder: SparseCoder, code: SparseCode, x: Tensor, ends: tuple[int, ...]
) -> list[Tensor]:
    """Return the same from a sparse code, whose values outside a prefix are made zero."""
    residuals, start = [], 0
    for end in ends:
        is_detached = coder.cfg.detach_prefixes and start > 0 and end < ends[-1]
        inside = code._replace(values=code.values.masked_fill(code.indices >= end, 0))
        if is_detached:
            new = code._replace(values=inside.values.masked_fill(code.indices < start, 0))
            added = coder.decode(new) - coder.b_dec
            residuals.append(residuals[-1].detach() - added)
        else:
            residuals.append(x - coder.decode(inside))
        start = end
    return residuals


def mean_squared(residual: Tensor, tilt: float) -> Tensor:
    """Return the tokens' mean ‖residual‖²; with a tilt, large ones count more."""
    if tilt == 0:
        flat = residual.flatten()
        return flat.dot(flat) / len(residual)
    return token_mean(torch.linalg.vecdot(residual, residual), tilt)


def token_mean(errors: Tensor, tilt: float) -> Tensor:
    """Return the mean of the tokens' errors (n), large ones counting more.

    Weights are softmax(tilt · error / mean error), held constant.
    Source: Li et al. 2020 (arXiv 2007.01162), tilted empirical risk; in units of the mean, so that
    one tilt fits any data.
    """
    if tilt == 0:
        return errors.mean()
    relative = errors.detach() / errors.detach().mean().clamp_min(1e-30)
    return (torch.softmax(tilt * relative, dim=0) * errors).sum()
