"""Where b_dec starts: the centre of the activations."""

from __future__ import annotations

import torch
from torch import Tensor


def geometric_median(x: Tensor, *, max_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Return the point with the least sum of distances to the rows of `x` (n, d_in).

    Unlike the mean it hardly moves for a few tokens of extreme norm.
    Source: Weiszfeld 1937, the fixed-point iteration from the mean.
    """
    x = x.double()
    centre = x.mean(0)
    for _ in range(max_iterations):
        weights = 1 / (x - centre).norm(dim=1).clamp_min(1e-12)
        moved = (weights @ x) / weights.sum()
        is_settled = (moved - centre).norm() <= tolerance * (1e-12 + centre.norm())
        centre = moved
        if is_settled:
            break
    return centre.float()


def initial_b_dec(x: Tensor, method: str) -> Tensor:
    """Return b_dec's starting value from a sample `x` (n, d_in), by `CoderConfig.b_dec_init`."""
    return B_DEC_INITS[method](x)


B_DEC_INITS = {
    "geometric_median": geometric_median,
    "mean": lambda x: x.double().mean(0).float(),
    "zeros": lambda x: torch.zeros(x.shape[1]),
}
