"""Where b_dec starts: the centre of the activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OverRanks = Callable[[Tensor], Tensor]


def geometric_median(
    x: Tensor,
    over_ranks: OverRanks = lambda x: x,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-6,
) -> Tensor:
    """Return the point with the least sum of distances to the rows of `x` (n, d_in).

    Unlike the mean it hardly moves for a few tokens of extreme norm. `over_ranks` adds a tensor up
    over the processes that train together, each of which has some of the rows.
    Source: Weiszfeld 1937, the fixed-point iteration from the mean.
    """
    x = x.double()
    centre = weighted_mean(x, torch.ones_like(x[:, 0]), over_ranks)
    for _ in range(max_iterations):
        weights = 1 / (x - centre).norm(dim=1).clamp_min(1e-12)
        moved = weighted_mean(x, weights, over_ranks)
        is_settled = (moved - centre).norm() <= tolerance * (1e-12 + centre.norm())
        centre = moved
        if is_settled:
            break
    return centre.float()


def weighted_mean(x: Tensor, weights: Tensor, over_ranks: OverRanks) -> Tensor:
    """Return Σ w x / Σ w, (d_in), over the rows of all processes."""
    sums = over_ranks(torch.cat([weights @ x, weights.sum()[None]]))
    return sums[:-1] / sums[-1]


def mean(x: Tensor, over_ranks: OverRanks = lambda x: x) -> Tensor:
    """Return the mean of the rows of all processes."""
    return weighted_mean(x.double(), torch.ones_like(x[:, 0]).double(), over_ranks).float()


def zeros(x: Tensor, _: OverRanks = lambda x: x) -> Tensor:
    """Return the origin."""
    return torch.zeros(x.shape[1])


def initial_b_dec(x: Tensor, method: str, over_ranks: OverRanks = lambda x: x) -> Tensor:
    """Return b_dec's starting value from a sample `x` (n, d_in), by `CoderConfig.b_dec_init`.

    It is that of the samples of all processes together.
    """
    return B_DEC_INITS[method](x, over_ranks)


B_DEC_INITS: dict[str, Callable[[Tensor, OverRanks], Tensor]] = {
    "geometric_median": geometric_median,
    "mean": mean,
    "zeros": zeros,
}
