"""Activations straight from a language model: text → contexts → forward.

`captured_contexts` keeps tokens and activations together, for evaluation and reports; `LiveRows`
gives the kept tokens' activations, block by block, to a shuffle buffer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from sae.config import StreamConfig
from sae.stream.contexts import CapturedContexts, Contexts
from sae.stream.lanes import norms
from sae.stream.reader import Reader
from sae.stream.rows import Block
from sae.stream.tokens import ContextStream


def capture_contexts(
    reader: Reader, contexts: Contexts, *, max_norm: float | None = None
) -> CapturedContexts:
    """Run the model on `contexts` up to the last place; activations of several are side by side.

    `max_norm`, in raw units, also drops tokens of larger norm at the first place from `is_kept`.
    """
    parts = reader.read(contexts.tokens)
    is_kept = contexts.is_kept.to(parts[0].device)
    if max_norm is not None:
        is_kept = is_kept & (norms(parts[0]) <= max_norm)
    activations = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    fields = {f.name: getattr(contexts, f.name) for f in dataclasses.fields(Contexts)}
    return CapturedContexts(**{**fields, "is_kept": is_kept}, activations=activations)


def captured_contexts(
    reader: Reader,
    contexts: Iterable[Contexts],
    *,
    max_norm: float | None = None,
) -> Iterator[CapturedContexts]:
    """Yield each batch of contexts with its activations."""
    for batch in contexts:
        yield capture_contexts(reader, batch, max_norm=max_norm)


class LiveRows:
    """Kept tokens' activations at the hookpoints of a reader; a `RowStream`.

    Args:
        make_contexts: makes a `ContextStream` at its beginning; called once to train from and once
            for every sample, so that sampling consumes nothing.
        metadata: what a dictionary should remember of its origin besides the hookpoint.
    """

    def __init__(
        self,
        reader: Reader,
        make_contexts: Callable[[], ContextStream],
        cfg: StreamConfig,
        metadata: dict[str, object],
    ):
        self.reader, self.cfg = reader, cfg
        self.make_contexts, self.contexts = make_contexts, make_contexts()
        self.names, self.widths, self.dtypes = reader.names, reader.widths, reader.dtypes
        self._metadata = metadata
        self._counts: dict[str, float] = {"read": 0}

    @property
    def epoch(self) -> int:
        """Whole passes over the documents before the last block."""
        return self.contexts.epoch

    def next_block(self) -> Block:
        """Return the kept rows of the next forward pass; an empty block where it keeps none."""
        contexts = self.contexts.next_batch(self.cfg.sequences_per_forward)
        self._count(contexts)
        return self._block(contexts)

    def sample(self) -> Block:
        """Return the rows of the first `stream.calibration_sequences` contexts."""
        contexts = self.make_contexts()
        batch_size = min(self.cfg.sequences_per_forward, self.cfg.calibration_sequences)
        n_batches = -(-self.cfg.calibration_sequences // batch_size)
        blocks = [self._block(contexts.next_batch(batch_size)) for _ in range(n_batches)]
        rows = (torch.cat(parts) for parts in zip(*(block.rows for block in blocks), strict=True))
        return Block(tuple(rows), torch.cat([block.documents for block in blocks]))

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the text, and the counts of tokens."""
        return {**self.contexts.state_dict(), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit for bit from a saved place."""
        self.contexts.load_state_dict(state)
        self._counts = dict(state["counts"])

    def token_counts(self) -> dict[str, float]:
        """Return how many tokens were read so far ("read"), and left out for each reason."""
        return self._counts

    def weights(self) -> Iterator[Tensor]:
        """Yield the models' weights."""
        for lm, _ in self.reader.sites:
            yield from lm.module.state_dict().values()

    def metadata(self) -> dict[str, object]:
        """Return what SAELens calls the origin of a dictionary."""
        return {**self._metadata, "hook_name": self.names[0]}

    def _count(self, contexts: Contexts) -> None:
        n = contexts.tokens.numel()
        shares = {"read": 1.0, **self.contexts.masked_shares(contexts)}
        for name, share in shares.items():
            self._counts[name] = self._counts.get(name, 0) + round(n * share)

    def _block(self, contexts: Contexts) -> Block:
        """Run the model; each kept activation is copied once, out of what the forward made."""
        kept = contexts.is_kept.flatten().nonzero().squeeze(1)
        rows = (
            activations.flatten(0, 1).index_select(0, kept.to(activations.device))
            for activations in self.reader.read(contexts.tokens)
        )
        return Block(tuple(rows), contexts.document_ids.flatten()[kept])
