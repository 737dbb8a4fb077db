"""Where a score lies between what is worth nothing and what is perfect.

With s the score, s_0 that of the same dictionary with its codes shuffled in time, s_1 that of the
truth where the world is known, else of a perfect dictionary (1, or 0 where less is better):
    share of the way = (s − s_0) / (s_1 − s_0)
0 says that the metric does not see which token a code belongs to, or that the codes say nothing.
There is no share of a metric that does not judge; that nothing bounds, where no truth is known;
that good dictionaries score better on than the truth (targeted perturbation); or whose s_0 is no
worse than s_1.
Source: the form of Cohen 1960, "A coefficient of agreement for nominal scales" (chance-corrected).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from sae.evals.interface import Label

if TYPE_CHECKING:
    from sae.evals.results import EvalResults

ZERO, TRUTH = "shuffled", "oracle"
SMALLEST_SPAN = 1e-3
"""Of s_1 − s_0: below it the quotient says nothing."""


class Scale(NamedTuple):
    """The line that a metric's scores are drawn on.

    zero, one: s_0 and s_1. is_truth: s_1 is that of the truth, not of a perfect dictionary.
    """

    zero: float
    one: float
    is_truth: bool

    def share(self, value: float) -> float:
        """Return how far along the line a value lies."""
        return (value - self.zero) / (self.one - self.zero)


def scale_of(metric: str, label: Label, results: EvalResults) -> Scale | None:
    """Return the metric's line in these results; None where there is none."""
    zero, truth = (_value(results, name, metric) for name in (ZERO, TRUTH))
    is_truth = truth is not None and label.is_below_truth
    one = truth if is_truth else label.best
    if not label.better or zero is None or one is None or not label.is_below_truth:
        return None
    span = one - zero if label.better == "higher" else zero - one
    return Scale(zero, one, is_truth) if span >= SMALLEST_SPAN else None


def _value(results: EvalResults, null: str, metric: str) -> float | None:
    metrics: Mapping[str, float | None] = (
        results.nulls[null].metrics if null in results.nulls else {}
    )
    return metrics.get(metric)
