"""Evals as they finish: each is computed once, joined to those before it, and handed on to be kept.

A judge may be asked for an hour, and a machine may go: what finished is not lost with the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from sae.config import EvalName
from sae.evals.interface import Accumulator, Explains, Explanation
from sae.evals.ranks import Ranks
from sae.evals.results import EvalRecord, EvalResults, collect, joined_results

Evals = dict[EvalName, Accumulator]
Keep = Callable[[EvalResults], None]


class Clock:
    """Seconds spent, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's time to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Finishing:
    """The results so far.

    Args:
        before: results with evals that finished earlier; None: there are none.
        keep: given the results whenever they grow, on the first process.
    """

    def __init__(self, clock: Clock, ranks: Ranks, before: EvalResults | None, keep: Keep) -> None:
        self.clock, self.ranks, self.keep = clock, ranks, keep
        self.results = before or EvalResults({}, {}, {}, {}, {})

    def left(self, names: Iterable[EvalName]) -> tuple[EvalName, ...]:
        """Return those of `names` that have not finished."""
        return tuple(name for name in names if name not in self.results.evals)

    def finish(
        self,
        evals: Evals,
        origin: Mapping[str, Any],
        arrays: Mapping[str, Tensor],
        *,
        is_shared: bool = True,
    ) -> None:
        """Compute evals of which all processes have seen their share, and keep each at once.

        `arrays` are of what was evaluated, whatever the eval. What is not shared was fed on the
        first process alone.
        """
        if is_shared:
            self.ranks.merge_into_first(evals)
        self.results = replace(self.results, provenance={**self.results.provenance, **origin})
        if not self.ranks.is_first:
            return
        for name, accumulator in evals.items():
            found = results_of({name: accumulator}, self.clock, origin)
            found = replace(found, arrays={**found.arrays, **arrays})
            self.results = joined_results(self.results, found)
            self.keep(self.results)


def results_of(evals: Evals, clock: Clock, origin: Mapping[str, Any]) -> EvalResults:
    """Return what the accumulators found, with the time that each took."""
    records, metrics, arrays = {}, {}, {}
    for name, accumulator in evals.items():
        with clock.timed(name):
            metrics[name], arrays[name] = accumulator.compute(), accumulator.arrays()
        seen = accumulator.seen
        keys = tuple(metrics[name])
        records[name] = EvalRecord(seen.n_tokens, seen.n_documents, clock.seconds[name], keys)
    words: dict[EvalName, list[Explanation]] = {
        name: one.explanations() for name, one in evals.items() if isinstance(one, Explains)
    }
    return collect(records, metrics, arrays, origin, words)
