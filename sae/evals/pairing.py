"""Differences between dictionaries that were evaluated on the same documents.

    difference = a − b, with the 2.5th and 97.5th percentile of a_r − b_r over resamples r
Results keep every metric's resamples (`bootstrap.Estimate`); of the same documents with the same
seed, resample r holds the same documents for both, so what is hard in a document is hard for both
and cancels: the interval of a difference is then much narrower than those of its two sides tell.

Results of other tokens, documents, seeds or models are refused by name: their difference would say
what was measured, not which dictionary is better.
Cannot see: the spread over training seeds, which is often larger than that over documents.
Source: Efron and Tibshirani 1993, "An introduction to the bootstrap" (paired samples); Koehn 2004,
"Statistical significance tests for machine translation evaluation" (the same test set for both).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sae.evals.bootstrap import interval
from sae.evals.interface import Undefined, Value
from sae.evals.results import EvalResults

SAME = {
    "model": "model",
    "reinitialised": "seed of the model's weights",
    "model_dtype": "precision of the model",
    "hookpoint": "hookpoint",
    "world": "world",
    "max_norm": "largest norm",
    "seed": "seed",
    "n_resamples": "resamples",
    "n_tokens": "number of tokens",
    "n_documents": "number of documents",
    "evaluated": "digest of the tokens",
}
"""What the provenance of comparable results must agree in, and its name in words."""


class Difference(NamedTuple):
    """a − b, and its 95% interval where the two can be paired."""

    value: float
    low: Value
    high: Value

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        bounds = (self.low, self.high)
        return all(isinstance(bound, float) for bound in bounds) and not (
            self.low <= 0 <= self.high  # pyright: ignore[reportOperatorIssue]
        )


def require_comparable(named: Mapping[str, EvalResults]) -> None:
    """Refuse results that are not of the same tokens, documents, seeds and models.

    Errors: ValueError that names the two results and what they differ in.
    """
    (first, one), *others = named.items()
    for name, other in others:
        for result_name, result in ((first, one), (name, other)):
            if "evaluated" not in result.provenance:
                raise ValueError(
                    f"results must say on which tokens they were made; those of {result_name} are "
                    "of a version that did not. Run `sae eval` on it again."
                )
        differing = [key for key in SAME if _of(one, key) != _of(other, key)]
        if differing:
            shown = "; ".join(
                f"{SAME[key]} {_of(one, key)!r} and {_of(other, key)!r}" for key in differing
            )
            raise ValueError(
                f"results must be of the same tokens, documents, seeds and models to be compared; "
                f"{first} and {name} differ in: {shown}. Evaluate both alike, or give `--unpaired "
                "true` for a table without differences."
            )


def _of(results: EvalResults, key: str) -> Any:
    return results.provenance.get(key)


def difference(a: EvalResults, b: EvalResults, metric: str) -> Difference | None:
    """Return a's `metric` less b's; None where one of them has no value.

    The bounds are `Undefined` where the metric has no interval over documents, or where it was
    drawn from other documents in each (such as those in which a latent fires).
    """
    one, other = a.metrics.get(metric), b.metrics.get(metric)
    if one is None or other is None:
        return None
    bounds = _bounds(a, b, metric)
    return Difference(one - other, *bounds)


def _bounds(a: EvalResults, b: EvalResults, metric: str) -> tuple[Value, Value]:
    draws = [results.arrays.get(f"draws/{metric}") for results in (a, b)]
    present = [results.arrays.get(f"drawn_from/{metric}") for results in (a, b)]
    if draws[0] is None or draws[1] is None or present[0] is None or present[1] is None:
        return (none := Undefined("it has no interval over documents")), none
    if draws[0].shape != draws[1].shape or not present[0].equal(present[1]):
        return (none := Undefined("it was taken from other documents in each")), none
    return interval(draws[0] - draws[1], int(present[0].sum()))
