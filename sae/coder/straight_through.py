"""Straight-through derivatives of the two functions that jump at a threshold θ.

jumprelu(h) = h · [h > θ]      d/dθ = −(θ/ε) K      step(h) = [h > θ]      d/dθ = −(1/ε) K

K is 1 where |h − θ| < ε/2 and else 0, ε the bandwidth. On demand h gets the opposite derivative
besides its own, as a jump moves with h as it does with −θ.
Source: Rajamanoharan et al. 2024b (arXiv 2407.14435), eq. 11 and 12; for h, Anthropic's January
2025 update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Jump(torch.autograd.Function):
    """h · [h > θ] or [h > θ], for h (n, d_sae) and θ (d_sae)."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, theta: Tensor, bandwidth: float, reaches_x: bool, is_step: bool
    ) -> Tensor:
        ctx.save_for_backward(h, theta)
        ctx.bandwidth, ctx.reaches_x, ctx.is_step = bandwidth, reaches_x, is_step
        is_above = h > theta
        return is_above.to(h.dtype) if is_step else h * is_above

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        h, theta = ctx.saved_tensors
        in_window = (h - theta).abs() < ctx.bandwidth / 2
        jump = (grad if ctx.is_step else grad * theta) * in_window / ctx.bandwidth
        grad_h = None if ctx.is_step else grad * (h > theta)
        if ctx.reaches_x:
            grad_h = jump if grad_h is None else grad_h + jump
        return grad_h, -jump.sum(0).to(theta.dtype), None, None, None


def jumprelu(h: Tensor, theta: Tensor, bandwidth: float, *, reaches_x: bool) -> Tensor:
    """Return h · [h > θ], (n, d_sae)."""
    return _Jump.apply(h, theta.to(h.dtype), bandwidth, reaches_x, False)  # pyright: ignore[reportReturnType]


def step(h: Tensor, theta: Tensor, bandwidth: float, *, reaches_x: bool) -> Tensor:
    """Return [h > θ], (n, d_sae), as numbers."""
    return _Jump.apply(h, theta.to(h.dtype), bandwidth, reaches_x, True)  # pyright: ignore[reportReturnType]
