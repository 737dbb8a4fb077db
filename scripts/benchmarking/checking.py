"""How wrong an op is: its outputs on a slice of tokens or latents against float64.

The law is the tests': relative to the largest element of its row, an error may be at most twice
that of plain PyTorch in the inputs' own dtype, plus a rounding. A selection must be exact.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

N_CHECKED = 64
FLOOR = 1e-5  # of a row's largest element: float32 sums in another order
Triple = tuple[Tensor, Tensor, Tensor]  # what was computed, the same in plain PyTorch, the truth


class Deviation(NamedTuple):
    """How far outputs are from the truth: ≤ 1 of what the law allows, and a typical row's error."""

    over_allowed: float
    typical: float


EXACT = Deviation(0.0, 0.0)
WRONG = Deviation(float("inf"), float("inf"))


def selection(is_right: bool | Tensor) -> Deviation:
    """Return the deviation of something that is right or wrong, and nothing between."""
    return EXACT if bool(is_right) else WRONG


def worst_of(deviations: Iterable[Deviation]) -> Deviation:
    """Return the larger of each figure; NaN counts as infinitely wrong."""
    found = [EXACT, *deviations]
    return Deviation(*(max(map(_nan_is_inf, column)) for column in zip(*found, strict=True)))


def deviation(triples: Sequence[Triple]) -> Deviation:
    """Return the worst deviation of several outputs."""
    return worst_of(_one_deviation(*triple) for triple in triples)


def _one_deviation(ours: Tensor, eager: Tensor, exact: Tensor) -> Deviation:
    if ours.shape != exact.shape:
        return WRONG
    found, plain = _row_errors(ours, exact), _row_errors(eager, exact)
    allowed = 2 * plain.max() + max(FLOOR, torch.finfo(ours.dtype).eps)
    return Deviation(float(found.max() / allowed), float(found.median()))


def _row_errors(tensor: Tensor, exact: Tensor) -> Tensor:
    """Return each row's largest error over its largest element; a vector is one row."""
    error = (tensor.double() - exact).abs()
    scale = exact.abs()
    if error.dim() < 2:
        return (error / scale.max().clamp_min(1e-30)).reshape(-1)
    return error.amax(-1) / scale.amax(-1).clamp_min(1e-30)


def _nan_is_inf(number: float) -> float:
    return number if number == number else float("inf")


def sample(n: int, device: torch.device) -> Tensor:
    """Return up to 64 of n positions, evenly spread, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, N_CHECKED), device=device).round().long()


def sample_latents(indices: Tensor, d_sae: int) -> Tensor:
    """Return latents to check: some that fire, the one that fires most, and the last."""
    flat = indices.reshape(-1)
    most = torch.bincount(flat, minlength=d_sae).argmax()
    last = flat.new_tensor(d_sae - 1)
    return torch.cat([flat[sample(len(flat), flat.device)], torch.stack([most, last])]).unique()


def pair_sums(
    weights: Tensor, indices: Tensor, rows: Tensor, latents: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return Σ weight · row[token] (len(latents), d) and Σ weight over each latent's pairs."""
    k = indices.shape[1]
    pairs = torch.isin(indices.reshape(-1), latents).nonzero()[:, 0]
    slots = torch.searchsorted(latents, indices.reshape(-1)[pairs])
    chosen = weights.reshape(-1)[pairs].to(dtype)
    sums = torch.zeros((len(latents), rows.shape[1]), dtype=dtype, device=rows.device)
    sums.index_add_(0, slots, chosen[:, None] * rows[pairs // k].to(dtype))
    totals = torch.zeros(len(latents), dtype=dtype, device=rows.device)
    return sums, totals.index_add_(0, slots, chosen)


def kth_largest(x: Tensor, k: int) -> float:
    """Return the k-th largest element of x (n, F), by bisection: no second copy of x is made."""
    low, high = float(x.min()), float(x.max())
    if count_at_least(x, high) >= k:
        return high
    while True:
        # Rounded to x's dtype, so that it ends when nothing lies between.
        middle = float(x.new_tensor((low + high) / 2))
        if not low < middle < high:
            break
        if count_at_least(x, middle) >= k:
            low = middle
        else:
            high = middle
    inf = float("inf")
    return min(float(torch.where(rows >= low, rows, inf).min()) for rows in x.split(_chunk(x)))


def count_at_least(x: Tensor, bound: float) -> int:
    """Return how many elements of x (n, F) are ≥ bound."""
    return sum(int((rows >= bound).sum()) for rows in x.split(_chunk(x)))


def count_above(x: Tensor, bound: float | Tensor) -> int:
    """Return how many elements of x (n, F) are > bound, a number or (F,)."""
    return sum(int((rows > bound).sum()) for rows in x.split(_chunk(x)))


def _chunk(x: Tensor) -> int:
    return max(1, 2**30 // x.shape[1])
