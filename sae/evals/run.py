"""Evaluate a coder: feed every accumulator once, then compute.

The activations of the contexts pass once through all evals that read activations, with their mean
and L0 on the side. Evals that run the model itself follow, on the first of the same contexts: mean
ablation needs that mean. What is evaluated, and up to which token, is in `inputs`; how several
processes share it, in `ranks`; how evals that finished are kept, in `finishing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.coder.latents import Latents, joined
from sae.config import EvalConfig, EvalName
from sae.evals.company import Company, require_one_process
from sae.evals.evaluable import Evaluable
from sae.evals.fingerprint import TokenDigest, dictionary_digest
from sae.evals.finishing import Clock, Evals, Finishing, Keep
from sae.evals.inputs import Capture, ContextQueue, Where, limited
from sae.evals.interface import (
    Accumulator,
    ContextBatch,
    EvalBatch,
    EvalSetup,
    ModelBatch,
    Reads,
    Seen,
)
from sae.evals.probing.reading import labelled_batches
from sae.evals.provenance import versions
from sae.evals.ranks import Ranks
from sae.evals.registry import EVALS, chosen_names
from sae.evals.results import EvalResults, plain_json
from sae.evals.resuming import with_nulls
from sae.stream.contexts import CapturedContexts, Contexts
from sae.stream.source import require_finite

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
    on_weights = start_evals(left, "weights", setup)
    on_activations = start_evals(left, "activations", setup)
    on_contexts = start_evals(left, "contexts", setup)
    on_model = start_evals(left, "model", setup)
    on_labelled = start_evals(left, "labelled", setup)

    n_model_tokens = (tokens if downstream_tokens is None else downstream_tokens) if on_model else 0
    queue = ContextQueue(n_model_tokens)
    shared = Shared(ready.d_out, has_text=lm is not None)
    wanted = tokens if on_activations or on_contexts or before else n_model_tokens
    for number, batch in enumerate(limited(contexts, wanted) if left else ()):
        queue.add(batch)
        if not ranks.takes(number):
            continue
        with clock.timed("capture"):
            captured = capture(batch)
        latents = _update(shared, on_activations, captured, ready, capture.place, clock)
        _update_on_contexts(on_contexts, captured, latents, capture, clock)
        company.add(captured)
        tell("activations", _of_all(shared.seen.n_tokens, ranks, wanted), wanted)
    if not left:
        return finishing.results
    shared = shared.over(ranks)
    shared.require_tokens()
    company.finish()

    origin = _origin(ready, capture, shared, setup, clock) | dict(about or {})
    finishing.finish(on_weights | on_activations | on_contexts, origin, shared.arrays())
    if lm is not None and capture.places is not None:
        at_places = partial(ModelBatch, ready, lm, capture.places)
        make_batch = partial(at_places, mean=shared.mean, max_norm=max_norm)
        for name, accumulator in on_model.items():
            feed = partial(company.run_model, name, accumulator, make_batch)
            _run_on_model(name, feed, queue, ranks, clock, tell)
            finishing.finish({name: accumulator}, origin, shared.arrays())
        for name, accumulator in on_labelled.items():
            if ranks.is_first:
                _run_on_labelled(
                    name, accumulator, capture, ready, settings.probe_context_tokens, clock, tell
                )
            finishing.finish({name: accumulator}, origin, shared.arrays(), is_shared=False)
    return replace(finishing.results, nulls={**finishing.results.nulls, **company.results()})


class Shared:
    """What every result carries: the tokens seen, their mean activation (d_in), their L0."""

    def __init__(self, d_in: int, has_text: bool = False) -> None:
        self.seen, self.digest = Seen(), TokenDigest(has_text)
        self._sum = torch.zeros(d_in, dtype=torch.float64)
        self._n_active = 0

    def update(self, batch: EvalBatch) -> None:
        """Add n tokens."""
        self.seen.update(batch.document_ids)
        self.digest.update(batch.document_ids, batch.tokens, batch.x)
        self._sum += batch.x.sum(0, dtype=torch.float64).cpu()
        self._n_active += int(batch.latents.l0().sum())

    @property
    def mean(self) -> Tensor:
        return self._sum / max(self.seen.n_tokens, 1)

    @property
    def l0(self) -> float:
        return self._n_active / max(self.seen.n_tokens, 1)

    def over(self, ranks: Ranks) -> Shared:
        """Return what all processes saw."""
        whole, *others = ranks.everywhere(self)
        for other in others:
            whole.seen.merge(other.seen)
            whole.digest.merge(other.digest)
            whole._sum += other._sum
            whole._n_active += other._n_active
        return whole

    def arrays(self) -> dict[str, Tensor]:
        """Return which documents were seen, where they have numbers of their own in a text."""
        return {"evaluated/document_ids": self.seen.documents} if self.digest.has_text else {}

    def require_tokens(self) -> None:
        """Refuse to compute from nothing."""
        if self.seen.n_tokens == 0:
            raise ValueError(
                "the contexts must hold tokens that are not masked; there were none. Give more "
                "text, or mask fewer tokens (`data.mask`, `data.exclude_tokens`, "
                "`data.max_norm_ratio`)."
            )


def _peek(contexts: Iterable[Contexts]) -> tuple[Iterator[Contexts], Contexts]:
    batches = iter(contexts)
    first = next(batches, None)
    if first is None:
        raise ValueError("the contexts must hold tokens; there were none. Give more text.")
    return chain([first], batches), first


def start_evals(names: tuple[EvalName, ...], reads: str, setup: EvalSetup) -> Evals:
    """Return new accumulators for those of `names` that read the kind `reads`."""
    return {name: EVALS[name].make(setup) for name in names if EVALS[name].reads == reads}


def _update(
    shared: Shared,
    evals: Evals,
    captured: CapturedContexts,
    coder: Evaluable,
    place: str,
    clock: Clock,
) -> Latents:
    """Encode a batch's unmasked tokens once, in chunks, feed every eval, return the code."""
    x = captured.activations
    is_kept = captured.is_kept.to(x.device)
    tokens, document_ids = (
        part.to(x.device)[is_kept] for part in (captured.tokens, captured.document_ids)
    )
    x = x[is_kept] if x.dtype == torch.float64 else x[is_kept].float()
    require_finite(x, place, "of an evaluated batch")
    codes = [Latents(x.new_zeros(0, 1), tokens.new_zeros(0, 1))]
    for rows in coder.chunks(len(x)):
        with clock.timed("coder"):
            latents, x_hat = coder.encode_decode(x[rows])
        written = coder.written(x[rows])
        batch = EvalBatch(written, x_hat, latents, tokens[rows], document_ids[rows])
        shared.update(batch)
        for name, accumulator in evals.items():
            with clock.timed(name):
                accumulator.update(batch)
        codes.append(latents)
    return joined(codes)


def _update_on_contexts(
    evals: Evals,
    captured: CapturedContexts,
    latents: Latents,
    capture: Capture,
    clock: Clock,
) -> None:
    kept = captured.is_kept.flatten().nonzero()[:, 0].to(latents.indices.device)
    batch = ContextBatch(captured, latents, kept, capture.lm, capture.places)
    for name, accumulator in evals.items():
        with clock.timed(name):
            accumulator.update(batch)


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
    coder: Evaluable,
    context_tokens: int,
    clock: Clock,
    tell: Tell,
) -> None:
    """Read labelled texts, which are few: the first process does it alone."""
    texts: LabelledTexts = accumulator.source.texts  # type: ignore[attr-defined]
    assert capture.reader is not None
    batches = labelled_batches(texts, capture.reader, coder, context_tokens)
    while True:
        with clock.timed(name):
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
