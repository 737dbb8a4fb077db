"""How badly a code reconstructs: the whole, its Matryoshka prefixes, a second code with more.

With ℓ_i(x_hat) = ‖x_i − x_hat_i‖² / variance, and prefixes of m_1 < … < m_P = d_sae latents:
  reconstruction = mean over tokens and prefixes of ℓ_i(x_hat of the prefix)
  multi_topk     = mean over tokens of ℓ_i(x_hat of the wider code)

`variance` is a constant, the mean squared distance of activations from their mean on the
calibration sample: with it the loss of a batch is the mean of its parts', however the batch is
split over micro-batches and processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.coder import SparseCoder
from sae.coder.latents import SparseCode
from sae.coder.step_values import StepValues


def reconstruct(
    coder: SparseCoder, code: SparseCode | Tensor, x: Tensor, values: StepValues, variance: float
) -> tuple[Tensor, Tensor]:
    """Return x_hat (n, d_in) of the whole dictionary, and the loss over all prefixes."""
    tilt = coder.cfg.tilt
    if not values.prefixes:
        x_hat = coder.decode(code)
        return x_hat, token_mean(squared_error(x, x_hat), tilt) / variance
    parts = prefix_parts(coder, code, values.prefixes)
    x_hat = coder.b_dec + torch.stack(parts).sum(0)
    *inner, whole = reconstructions(coder.b_dec, parts, detached=coder.cfg.detach_prefixes)
    losses = [token_mean(squared_error(x, x_hat), tilt) for x_hat in (*inner, whole)]
    return x_hat, torch.stack(losses).mean() / variance


def reconstructions(b_dec: Tensor, parts: list[Tensor], *, detached: bool) -> list[Tensor]:
    """Return the x_hat of each prefix, the whole last, from what each adds to the one before.

    Detached, a prefix sees the one before it as a constant, all but the whole.
    Source: Bussmann et al. 2025 (arXiv 2503.17547), eq. 4; detaching after D. Chanin's
    LISTA-Matryoshka for SynthSAEBench.
    """
    found = [b_dec + parts[0]]
    for part in parts[1:-1]:
        found.append((found[-1].detach() if detached else found[-1]) + part)
    return [*found, b_dec + torch.stack(parts).sum(0)] if len(parts) > 1 else found


def prefix_parts(
    coder: SparseCoder, code: SparseCode | Tensor, ends: tuple[int, ...]
) -> list[Tensor]:
    """Return what the latents from one prefix's end to the next add to x_hat, (n, d_in)."""
    starts = (0, *ends[:-1])
    if isinstance(code, Tensor):
        return [
            code[:, start:end] @ coder.W_dec[start:end]
            for start, end in zip(starts, ends, strict=True)
        ]
    parts = []
    for start, end in zip(starts, ends, strict=True):
        is_outside = (code.indices < start) | (code.indices >= end)
        values = code.values.masked_fill(is_outside, 0)
        parts.append(coder.decode(code._replace(values=values)) - coder.b_dec)
    return parts


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return each token's ‖x − x_hat‖², (n)."""
    return (x - x_hat).pow(2).sum(-1)


def token_mean(errors: Tensor, tilt: float) -> Tensor:
    """Return the mean of the tokens' errors (n), badly reconstructed ones counting more.

    Weights are softmax(tilt · error / mean error), held constant.
    Source: Li et al. 2020 (arXiv 2007.01162), tilted empirical risk; in units of the mean, so that
    one tilt fits any data.
    """
    if tilt == 0:
        return errors.mean()
    relative = errors.detach() / errors.detach().mean().clamp_min(1e-30)
    return (torch.softmax(tilt * relative, dim=0) * errors).sum()
