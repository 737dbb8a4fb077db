"""A dictionary's company: nulls and twins that are measured beside it on the same tokens.

Nulls that are fitted need a sample. The first CALIBRATION_TOKENS tokens are it: they are kept until
they are there, given to all nulls then, and evaluated as the others are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.config import EvalName
from sae.evals.downstream import contexts_at_once
from sae.evals.evaluable import Evaluable
from sae.evals.finishing import Clock
from sae.evals.inputs import Capture, pieces_of
from sae.evals.interface import Accumulator, EvalSetup, ModelBatch
from sae.evals.null_rows import (
    CALIBRATION_TOKENS,
    NULLS,
    NullInputs,
    checked_nulls,
    evals_of_nulls,
    require_possible,
)
from sae.evals.ranks import Ranks
from sae.evals.registry import EVALS
from sae.evals.results import EvalResults, NullResult, collect
from sae.evals.rotation import n_tokens
from sae.evals.truth import truth_of
from sae.evals.walk import Walk, kept_rows
from sae.stream.contexts import CapturedContexts, Contexts

if TYPE_CHECKING:
    from sae.worlds.world import World

ELSEWHERE = "a dictionary that was trained elsewhere"


class Company:
    """What is measured beside the dictionary of `setup`, with the evals `names`.

    Args:
        capture: says the width of the activations and the model, where they are of one.
        world, pairs: the world, where they are of one, and its pairs.
        nulls, twins: as `run.evaluate` has them.

    Errors: ValueError for nulls that are none or cannot be, and twins of another width.
    """

    def __init__(
        self,
        setup: EvalSetup,
        names: tuple[EvalName, ...],
        capture: Capture | None = None,
        *,
        world: World | None = None,
        pairs: Tensor | None = None,
        nulls: Iterable[str] = (),
        twins: Mapping[str, Any] | None = None,
    ) -> None:
        assert setup.coder is not None
        self._setup, self._coder, self._capture = setup, setup.coder, capture
        self._world, self._pairs = world, pairs
        self._to_make = checked_nulls(nulls)
        require_possible(self._to_make, self._coder, world is not None)
        self._names, self._left_out = evals_of_nulls(names, setup.settings)
        self.walks = {name: self._walk(twin) for name, twin in (twins or {}).items()}
        self._held: list[CapturedContexts] = []
        self._clock = Clock()

    def add(self, captured: CapturedContexts) -> None:
        """Take a batch of contexts with their activations."""
        for name, walk in self.walks.items():
            with self._clock.timed(name):
                walk.add(captured)
        if self._to_make:
            self._held.append(captured)
            if sum(map(n_tokens, self._held)) >= CALIBRATION_TOKENS:
                self._make_nulls()

    def finish(self) -> None:
        """End the pass over activations."""
        if self._to_make:
            self._make_nulls()
        for name, walk in self.walks.items():
            with self._clock.timed(name):
                walk.finish()

    def run_model(
        self,
        name: EvalName,
        accumulator: Accumulator,
        make_batch: Callable[..., ModelBatch],
        contexts: Contexts,
    ) -> None:
        """Feed an eval of the dictionary that runs the model, and those beside it.

        A few contexts at once, so that all can have the passes that no dictionary writes into.
        """
        lm = None if self._capture is None else self._capture.lm
        n_rows = contexts_at_once(lm, contexts) if lm and self.walks else len(contexts.tokens)
        for piece in pieces_of(contexts, n_rows):
            batch = make_batch(contexts=piece)
            accumulator.update(batch)
            if name in self._names:
                for null, walk in self.walks.items():
                    with self._clock.timed(null):
                        walk.run_model(name, partial(_of, batch))

    def results(self) -> dict[str, NullResult]:
        """Return what was found of each, by name."""
        return {name: self._result(name, walk) for name, walk in self.walks.items()}

    def _walk(self, coder: Any) -> Walk:
        capture, own = self._capture, self._coder
        place = "the world" if capture is None else capture.place
        ready = Evaluable(coder, own.sites.width, place)
        if ready.sites.widths != own.sites.widths:
            raise ValueError(
                f"what is measured beside a dictionary must have its places; got widths "
                f"{list(ready.sites.widths)} beside {list(own.sites.widths)}. Name another."
            )
        truth = None if self._world is None else truth_of(ready, self._world, self._pairs)
        setup = replace(self._setup, d_sae=ready.d_sae, truth=truth, coder=ready)
        evals: dict[EvalName, Accumulator] = {n: EVALS[n].make(setup) for n in self._names}
        return Walk(ready, evals, capture)

    def _make_nulls(self) -> None:
        inputs, names = self._inputs(), self._to_make
        self._to_make = ()
        for name in names:
            make = NULLS[name].make
            assert make is not None
            with self._clock.timed(name):
                self.walks[name] = self._walk(make(inputs))
                for captured in self._held:
                    self.walks[name].add(captured)
        self._held = []

    def _inputs(self) -> NullInputs:
        own, truth = Walk(self._coder, {}), self._setup.truth
        rows = torch.cat([self._coder.sites.read(kept_rows(one)[0]) for one in self._held])
        n_active = torch.cat([own.encoded(captured).l0() for captured in self._held])
        return NullInputs(
            self._coder,
            rows,
            float(n_active.double().mean()),
            self._setup.seed,
            self._world,
            None if truth is None else truth.frequent,
        )

    def _result(self, name: str, walk: Walk) -> NullResult:
        with self._clock.timed(name):
            found = collect({}, {one: walk.evals[one].compute() for one in walk.evals}, {}, {})
        model = None if walk.lm is None else walk.lm.name
        origin = {"l0": walk.l0, "d_sae": walk.coder.d_sae, "model": model}
        seconds = self._clock.seconds[name]
        return as_null(name, replace(found, provenance=origin), self._left_out, seconds)


def require_one_process(ranks: Ranks, beside: Iterable[str]) -> None:
    """Refuse to measure nulls on several processes: each is shuffled and fitted on all tokens."""
    names = list(beside)
    if names and ranks.size > 1:
        raise ValueError(
            f"nulls must be measured by one process; got {ranks.size} for {', '.join(names)}. "
            "Leave the launcher out, or `--nulls`."
        )


def as_null(
    name: str, found: EvalResults, left_out: Mapping[str, str], seconds: float
) -> NullResult:
    """Return the numbers of a null, and what it is."""
    row, origin = NULLS.get(name), found.provenance
    return NullResult(
        metrics=found.metrics,
        undefined=found.undefined,
        l0=origin["l0"],
        d_sae=origin["d_sae"],
        how=ELSEWHERE if row is None else row.how,
        keeps="" if row is None else row.keeps,
        destroys="" if row is None else row.destroys,
        model=origin["model"],
        left_out=dict(left_out),
        seconds=seconds,
    )


def _of(batch: ModelBatch, coder: Evaluable) -> ModelBatch:
    """Return the batch of another dictionary, on the same contexts."""
    return replace(batch, coder=coder)
