"""Where b_dec and thresholds start: the centre of the activations, and what lets enough through."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.coder.pre_acts import pre_activations

if TYPE_CHECKING:
    from sae.coder.coder import SparseCoder

# Enough to know a quantile by.
MOST_PRE_ACTS = 4_000_000

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


@torch.no_grad()
def start_biases_(coder: SparseCoder, x: Tensor, over_ranks: OverRanks = lambda x: x) -> None:
    """Let a new encoder begin at the centre of what it reads, where b_dec is of another place.

    b_enc = −mean(x) W_encᵀ: what an sae has from b_dec. `x` (n, sites.width) are rows.
    """
    if not coder.writes_what_it_reads:
        centre = mean(coder.sites.read(x), over_ranks).to(x.device)
        coder.b_enc.copy_(-(pre_activations(coder, centre[None])[0] - coder.b_enc))


@torch.no_grad()
def start_thresholds_(coder: SparseCoder, x: Tensor, over_ranks: OverRanks = lambda x: x) -> None:
    """Set the thresholds of a new JumpReLU coder so that it begins at its target L0.

    A threshold moves by about the learning rate a step, so one that begins far off would spend a
    short run on its way. `x` (n, sites.width) are rows; the level is the mean of the processes'
    own.
    """
    cfg = coder.cfg
    if cfg.activation != "jumprelu" or cfg.target_l0 is None or cfg.threshold_init is not None:
        return
    rows = x[: max(MOST_PRE_ACTS // coder.d_sae, 1)]
    kept = max(int(cfg.target_l0 * len(rows)), 1)
    pre_acts = pre_activations(coder, coder.sites.read(rows)).flatten()
    level = pre_acts.kthvalue(pre_acts.numel() - kept + 1).values.clamp_min(0)
    total = over_ranks(torch.stack([level, torch.ones_like(level)]))
    coder.threshold.fill_(total[0] / total[1])


B_DEC_INITS: dict[str, Callable[[Tensor, OverRanks], Tensor]] = {
    "geometric_median": geometric_median,
    "mean": mean,
    "zeros": zeros,
}
