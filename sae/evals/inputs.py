"""What is evaluated: contexts cut at a number of tokens, and their activations.

Contexts are cut by whole rows once enough unmasked tokens are in, so that the same tokens are
evaluated whatever the batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sae.evals.replacing import Places
from sae.stream.contexts import CapturedContexts, Contexts
from sae.stream.hookpoints import Hookpoint, find_hookpoints_of
from sae.stream.live import capture_contexts

if TYPE_CHECKING:
    from sae.stream.language_model import LanguageModel


Where = Hookpoint | str | Sequence[Hookpoint]
SomeContexts = TypeVar("SomeContexts", bound=Contexts)


def activation_contexts(
    batches: Iterable[Tensor], document_ids: Iterable[Tensor] | None = None
) -> Iterator[CapturedContexts]:
    """Yield activations that no language model gave, (n, d_in) each, as contexts of one token.

    Without `document_ids`, (n) each, every row counts as a document of its own: right for
    independent samples. Where rows come in groups (images, recordings), name the groups, or the
    intervals will be too narrow.
    """
    n_before = 0
    ids = None if document_ids is None else iter(document_ids)
    for x in batches:
        of_rows = torch.arange(n_before, n_before + len(x)) if ids is None else next(ids)
        n_before += len(x)
        yield CapturedContexts(
            tokens=torch.zeros(len(x), 1, dtype=torch.int64),
            document_ids=of_rows[:, None],
            is_kept=torch.ones(len(x), 1, dtype=torch.bool),
            activations=x[:, None],
        )


def limited(contexts: Iterable[SomeContexts], tokens: int | None) -> Iterator[SomeContexts]:
    """Yield contexts until they hold `tokens` unmasked tokens; the row that reaches it is the last.

    None yields all.
    """
    if tokens is None:
        yield from contexts
        return
    left = tokens
    for batch in contexts if left > 0 else ():
        reached = batch.is_kept.sum(1).cumsum(0)
        n_rows = min(int((reached < left).sum()) + 1, len(reached))
        yield rows_of(batch, slice(0, n_rows))
        left -= int(reached[n_rows - 1])
        if left <= 0:
            return


def rows_of(contexts: SomeContexts, rows: slice) -> SomeContexts:
    """Return the same kind of record with some of its b rows."""
    fields = dataclasses.fields(contexts)
    return dataclasses.replace(
        contexts, **{field.name: getattr(contexts, field.name)[rows] for field in fields}
    )


def pieces_of(contexts: SomeContexts, n_rows: int) -> Iterator[SomeContexts]:
    """Yield the record in parts of at most `n_rows` rows."""
    for start in range(0, len(contexts.tokens), n_rows):
        yield rows_of(contexts, slice(start, start + n_rows))


class ContextQueue:
    """Contexts of `tokens` unmasked tokens, from whatever batches they are taken."""

    def __init__(self, tokens: int | None) -> None:
        self.left, self.n_tokens = tokens, 0
        self.contexts: list[Contexts] = []

    def add(self, contexts: Contexts) -> None:
        """Keep as many of the rows as are still wanted."""
        for part in limited([contexts], self.left):
            n_kept = int(part.is_kept.sum())
            self.contexts.append(part)
            self.n_tokens += n_kept
            self.left = None if self.left is None else self.left - n_kept


class Capture:
    """Gives contexts their activations: from the model, or as they already have them.

    Args:
        hookpoint: the place that is read, or several. target: those that are written, where they
            are others. other: a second model, read at the same hookpoints.
        first: a batch of the contexts to come, from which the width is read without a model.
        max_norm: mask tokens of larger activation norm at the first place, in raw units.

    Errors: ValueError where neither a model nor activations are there.
    """

    def __init__(
        self,
        lm: LanguageModel | None,
        hookpoint: Where | None,
        first: Contexts,
        max_norm: float | None,
        *,
        target: Where | None = None,
        other: LanguageModel | None = None,
    ) -> None:
        self.lm, self.max_norm = lm, max_norm
        self.places = self.reader = None
        if lm is None:
            self.width = _require_captured(first).activations.shape[-1]
            return
        written = () if target is None else _hookpoints_of(lm, target)
        self.places = Places(_hookpoints_of(lm, hookpoint), written, other)
        self.reader = self.places.reader(lm)
        self.width = sum(self.reader.widths)

    @property
    def place(self) -> str:
        """What the activations are called in messages."""
        return "the given batches" if self.places is None else str(self.places)

    def __call__(self, contexts: Contexts) -> CapturedContexts:
        """Return the contexts with their activations."""
        if self.reader is not None:
            return capture_contexts(self.reader, contexts, max_norm=self.max_norm)
        captured = _require_captured(contexts)
        if self.max_norm is None:
            return captured
        is_small = captured.activations.float().norm(dim=-1) <= self.max_norm
        return dataclasses.replace(captured, is_kept=captured.is_kept & is_small)


def _hookpoints_of(lm: LanguageModel, where: Where | None) -> tuple[Hookpoint, ...]:
    if where is None:
        raise ValueError(
            "`hookpoint` must say where the model is read; got None. Give the one the dictionary "
            "was trained on, such as model.layers.8."
        )
    if isinstance(where, str):
        return tuple(find_hookpoints_of(lm.module, where))
    return (where,) if isinstance(where, Hookpoint) else tuple(where)


def _require_captured(contexts: Any) -> CapturedContexts:
    if not isinstance(contexts, CapturedContexts):
        raise ValueError(
            "contexts must bring their activations where no language model is given; got "
            f"{type(contexts).__name__}. Give `lm` and `hookpoint`, or `activation_contexts(x)`."
        )
    return contexts
