"""Evaluate a coder: feed every accumulator once, then compute.

The activations of the contexts pass once through all evals that read activations (`walk`), with
their mean and L0 on the side (`shared`). Evals that run the model itself follow, on the first of
the same contexts: mean ablation needs that mean. What is evaluated, and up to which token, is in
`inputs`; how several processes share it, in `ranks`; how evals that finished are kept, in
`finishing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from sae.config import EvalConfig, EvalName
from sae.evals.company import Company, require_one_process
from sae.evals.evaluable import Evaluable
from sae.evals.fingerprint import dictionary_digest
from sae.evals.finishing import Clock, Evals, Finishing, Keep
from sae.evals.inputs import Capture, ContextQueue, Where, limited
from sae.evals.interface import Accumulator, EvalSetup, ModelBatch, Reads
from sae.evals.probing.reading import labelled_batches
from sae.evals.provenance import versions
from sae.evals.ranks import Ranks
from sae.evals.registry import EVALS, chosen_names
from sae.evals.results import EvalResults, plain_json
from sae.evals.resuming import with_nulls
from sae.evals.shared import Shared
from sae.evals.walk import WALKED, Walk
from sae.stream.contexts import Contexts

if TYPE_CHECKING:
    from sae.evals.probing.labelled import LabelledTexts
    from sae.stream.language_model import LanguageModel

WITHOUT_MODEL: tuple[Reads, ...] = ("weights", "activations")
ALL_BUT_WORLD: tuple[Reads, ...] = (*WITHOUT_MODEL, "contexts", "model", "labelled")
NEED_MODEL = ("model", "labelled")
Tell = Callable[[str, int, int | None], None]


@torch.no_grad()
def evaluate(
    coder: Any,
    contexts: Iterable[Contexts],
    *,
    lm: LanguageModel | None = None,
    hookpoint: Where | None = None,
    target: Where | None = None,
    other: LanguageModel | None = None,
    names: Iterable[str] | None = None,
    tokens: int | None = None,
    downstream_tokens: int | None = None,
    max_norm: float | None = None,
    seed: int = 0,
    n_resamples: int = 1000,
    settings: EvalConfig | None = None,
    nulls: Iterable[str] = (),
    twins: Mapping[str, Any] | None = None,
    tell: Tell = lambda *_: None,
    about: Mapping[str, Any] | None = None,
    before: EvalResults | None = None,
    keep: Keep = lambda _: None,
) -> EvalResults:
    """Return what the evals `names` say of `coder` on `contexts`.

    Of several processes (`ranks.join_ranks`) the first returns it, from what all evaluated; the
    others return results without evals.

    Args:
        coder: anything with encode (or encode_sparse) and decode.
        contexts: held-out contexts, read once; with activations (`CapturedContexts`, or
            `activation_contexts(x)`) where `lm` is None.
        lm, hookpoint: the model and where its activations are read. target: where they are
            written, for a transcoder. other: the second model of a crosscoder.
        names: rows of EVALS, or sets of them (`registry.SETS`); None: all that take less than
            minutes, without those that run the model where `lm` is None, and without those that
            need a world.
        tokens: unmasked tokens to evaluate; None: all of `contexts`.
        downstream_tokens: how many of these the evals that run the model use; None: all of them.
        max_norm: leave out tokens of larger activation norm, in raw units.
        seed, n_resamples: of the bootstrap.
        settings: what evals ask beyond that, such as who judges; None: the defaults.
        nulls: names of `null_rows.NULLS`, measured beside it on the same activations.
        twins: dictionaries of the same places to measure beside it, by name.
        tell: told (stage, unmasked tokens done, wanted or None) after every batch.
        about: what the provenance should say beside.
        before: results of the same coder on the same contexts, whose evals are not run again.
        keep: given all results so far whenever an eval has finished.

    Errors: ValueError for a wrong name and a coder whose width is not the hookpoint's (before the
    first batch), for contexts without tokens, and for activations or reconstructions that are not
    finite.
    """
    names = _wanted_names(names, lm)
    contexts, first = _peek(contexts)
    capture = Capture(lm, hookpoint, first, max_norm, target=target, other=other)
    ready = Evaluable(coder, capture.width, capture.place)
    settings = settings or EvalConfig()
    setup = EvalSetup(ready.d_out, ready.d_sae, seed, n_resamples, coder=ready, settings=settings)
    ranks, clock = Ranks.here(), Clock()
    beside = (*nulls, *(twins or {}))
    require_one_process(ranks, beside)
    finishing = Finishing(clock, ranks, with_nulls(before, names, beside), keep)
    left = finishing.left(names)
    company = Company(setup, left, capture, nulls=nulls, twins=twins)
    if not left:
        return finishing.results
    shared = Shared(ready.d_out, has_text=lm is not None)
    walk = Walk(ready, start_evals(left, WALKED, setup), capture, clock=clock, shared=shared)
    on_model = start_evals(left, ("model",), setup)

    n_model_tokens = (tokens if downstream_tokens is None else downstream_tokens) if on_model else 0
    queue = ContextQueue(n_model_tokens)
    wanted = tokens if walk.evals or before else n_model_tokens
    for number, batch in enumerate(limited(contexts, wanted)):
        queue.add(batch)
        if not ranks.takes(number):
            continue
        with clock.timed("capture"):
            captured = capture(batch)
        walk.add(captured)
        company.add(captured)
        tell("activations", _of_all(shared.seen.n_tokens, ranks, wanted), wanted)
    walk.finish()
    company.finish()
    shared = shared.over(ranks)
    shared.require_tokens()

    origin = _origin(ready, capture, shared, setup, clock) | dict(about or {})
    finishing.finish(start_evals(left, ("weights",), setup) | walk.evals, origin, shared.arrays())
    if lm is not None and capture.places is not None:
        at_places = partial(ModelBatch, ready, lm, capture.places)
        make_batch = partial(at_places, mean=shared.mean, max_norm=max_norm)
        for name, accumulator in on_model.items():
            feed = partial(company.run_model, name, accumulator, make_batch)
            _run_on_model(name, feed, queue, ranks, clock, tell)
            finishing.finish({name: accumulator}, origin, shared.arrays())
        for name, accumulator in start_evals(left, ("labelled",), setup).items():
            if ranks.is_first:
                _run_on_labelled(name, accumulator, capture, walk, settings, tell)
            finishing.finish({name: accumulator}, origin, shared.arrays(), is_shared=False)
    return replace(finishing.results, nulls={**finishing.results.nulls, **company.results()})


def _peek(contexts: Iterable[Contexts]) -> tuple[Iterator[Contexts], Contexts]:
    batches = iter(contexts)
    first = next(batches, None)
    if first is None:
        raise ValueError("the contexts must hold tokens; there were none. Give more text.")
    return chain([first], batches), first


def start_evals(names: tuple[EvalName, ...], reads: tuple[Reads, ...], setup: EvalSetup) -> Evals:
    """Return new accumulators for those of `names` that read one of the kinds `reads`."""
    return {name: EVALS[name].make(setup) for name in names if EVALS[name].reads in reads}


def _run_on_model(
    name: EvalName,
    feed: Callable[[Contexts], None],
    queue: ContextQueue,
    ranks: Ranks,
    clock: Clock,
    tell: Tell,
) -> None:
    n_done = 0
    for number, contexts in enumerate(queue.contexts):
        n_done += int(contexts.is_kept.sum())
        if ranks.takes(number):
            with clock.timed(name):
                feed(contexts)
        tell(name, n_done, queue.n_tokens)


def _of_all(n_tokens: int, ranks: Ranks, wanted: int | None) -> int:
    """Return about how many tokens all processes have done, from those of this one."""
    return n_tokens if ranks.size == 1 else min(n_tokens * ranks.size, wanted or n_tokens)


def _run_on_labelled(
    name: EvalName,
    accumulator: Accumulator,
    capture: Capture,
    walk: Walk,
    settings: EvalConfig,
    tell: Tell,
) -> None:
    """Read labelled texts, which are few: the first process does it alone."""
    texts: LabelledTexts = accumulator.source.texts  # type: ignore[attr-defined]
    assert capture.reader is not None
    reader, context_tokens = capture.reader, settings.probe_context_tokens
    batches = labelled_batches(texts, reader, walk.coder, context_tokens)
    while True:
        with walk.clock.timed(name):
            batch = next(batches, None)
            if batch is None:
                break
            accumulator.update(batch)
        tell(name, batch.task, len(texts.names))


def _origin(
    coder: Evaluable, capture: Capture, shared: Shared, setup: EvalSetup, clock: Clock
) -> dict[str, Any]:
    """Return what the numbers were made from and with."""
    lm = capture.lm
    return {
        "coder": plain_json(coder.metadata),
        "dictionary": dictionary_digest(coder.coder),
        "d_in": coder.d_in,
        "d_out": coder.d_out,
        "d_sae": coder.d_sae,
        "l0": shared.l0,
        "model": None if lm is None else lm.name,
        "model_dtype": None if lm is None else str(lm.dtype).removeprefix("torch."),
        "hookpoint": None if capture.places is None else str(capture.places),
        "max_norm": capture.max_norm,
        "n_tokens": shared.seen.n_tokens,
        "n_documents": shared.seen.n_documents,
        "evaluated": str(shared.digest),
        "seed": setup.seed,
        "n_resamples": setup.n_resamples,
        "seconds": {name: clock.seconds.get(name, 0.0) for name in ("capture", "coder")},
        **versions(),
    }


def _wanted_names(names: Iterable[str] | None, lm: object) -> tuple[EvalName, ...]:
    wanted = chosen_names(names, WITHOUT_MODEL if lm is None else ALL_BUT_WORLD)
    for name in wanted:
        if EVALS[name].reads == "world":
            raise ValueError(
                f"the eval {name!r} needs a world whose features are known; there is none. Leave "
                "it out, or use `evaluate_on_world`."
            )
        if EVALS[name].reads in NEED_MODEL and lm is None:
            raise ValueError(
                f"the eval {name!r} runs the language model; none was given. Give `lm` and "
                "`hookpoint`, or leave it out."
            )
    return wanted
