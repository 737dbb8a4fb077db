"""95% intervals: metrics recomputed on blocks of documents drawn with replacement.

A metric is a function of weighted block sums. All weights 1 give its value; weights that count how
often each block was drawn give one resample. The interval runs from the 2.5th to the 97.5th
percentile of the resamples. Blocks are drawn, not tokens: tokens of one document are alike, and
drawing tokens would give intervals that are far too narrow. Two dictionaries evaluated on the same
documents with the same seed are resampled alike: the differences of their draws are those of a
paired bootstrap (`pairing`), which is why a value keeps its draws.

Source: Efron 1982, "The jackknife, the bootstrap and other resampling plans" (percentile interval).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from sae.evals.interface import Undefined, Value

QUANTILES = (0.025, 0.975)
MIN_BLOCKS = 8

Statistics = Callable[[Tensor], Mapping[str, Tensor]]


class Estimate(float):
    """A number with the resamples behind its interval.

    Attributes:
        draws: (n_resamples) float64. is_present: (n_blocks) bool, the blocks drawn from.
    """

    draws: Tensor
    is_present: Tensor

    @classmethod
    def of(cls, value: Tensor, draws: Tensor, is_present: Tensor) -> Estimate:
        """Return `value` with its draws."""
        estimate = cls(value)
        estimate.draws, estimate.is_present = draws.clone(), is_present.clone()
        return estimate


def with_intervals(
    statistics: Statistics,
    is_present: Tensor,
    *,
    seed: int,
    n_resamples: int,
    reasons: Mapping[str, str] | None = None,
    can_pair: bool = True,
) -> dict[str, Value]:
    """Return each statistic as `name`, `name/low` and `name/high`.

    Args:
        statistics: takes weights (r, n_blocks) float64 and gives (r) for each name; NaN or infinity
            where a set of weights leaves it undefined.
        is_present: (n_blocks) bool, the blocks that hold tokens.
        reasons: why a statistic may be undefined.
        can_pair: the blocks are the same for every dictionary, as documents are and latents are
            not; the value then is an `Estimate`.
    """
    whole = statistics(is_present.double()[None])
    draws = statistics(resampling_weights(is_present, seed, n_resamples))
    n_present = int(is_present.sum())
    results: dict[str, Value] = {}
    for name, value in whole.items():
        if not torch.isfinite(value).all():
            reason = (reasons or {}).get(name, "its denominator is 0 on these tokens")
            results[name] = Undefined(reason)
            continue
        results[name] = Estimate.of(value, draws[name], is_present) if can_pair else float(value)
        low, high = interval(draws[name], n_present)
        results |= {f"{name}/low": low, f"{name}/high": high}
    return results


def resampling_weights(is_present: Tensor, seed: int, n_resamples: int) -> Tensor:
    """Return how often each block is drawn in each resample, (n_resamples, n_blocks) float64."""
    n_present = int(is_present.sum())
    weights = torch.zeros(n_resamples, len(is_present), dtype=torch.float64)
    if n_present:
        generator = np.random.default_rng(seed)
        shares = np.full(n_present, 1 / n_present)
        counts = generator.multinomial(n_present, shares, size=n_resamples)
        weights[:, is_present] = torch.from_numpy(counts).double()
    return weights


def interval(draws: Tensor, n_present: int) -> tuple[Value, Value]:
    """Return the 95% interval that draws from `n_present` blocks give."""
    if n_present < MIN_BLOCKS:
        undefined = Undefined(f"an interval needs {MIN_BLOCKS} documents; there are {n_present}")
        return undefined, undefined
    if not torch.isfinite(draws).all():
        undefined = Undefined("the metric is undefined on some resamples of the documents")
        return undefined, undefined
    low, high = np.quantile(draws.numpy(), QUANTILES)
    return float(low), float(high)
