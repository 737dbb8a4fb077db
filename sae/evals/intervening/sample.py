"""The contexts on which interventions are tried: a uniform sample, with activations and codes.

The one idea: every context has a pseudorandom number that depends on its tokens and documents
alone. The contexts of the lowest numbers, up to `n_tokens` unmasked tokens, do not depend on
batches, their order, or which process saw them, and two samples merge exactly.

Documents fall into two halves by a hash of their id: what is looked for is found in half 0 and
tried out in half 1.
Memory: n_tokens · (4 Σ widths + 12 k) bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.coder.latents import Latents, joined
from sae.evals.interface import ContextBatch, Seen
from sae.evals.numbers import STEP, mixed, wrapped

NO_TOKEN = -1


class Row(NamedTuple):
    """A context of t tokens, of which `kept` (n) are not masked.

    Shapes: tokens, document_ids (t) int64; x (n, Σ widths) float32; code (n, k) each; on the CPU.
    """

    number: int
    tokens: Tensor
    document_ids: Tensor
    kept: Tensor
    x: Tensor
    code: Latents


class ContextSample:
    """The contexts of the lowest numbers so far, lowest first."""

    def __init__(self, n_tokens: int, seed: int) -> None:
        self.n_tokens, self.seed = n_tokens, seed
        self.rows: list[Row] = []

    @property
    def seen(self) -> Seen:
        """The unmasked tokens that are in it, and their documents."""
        seen = Seen()
        for row in self.rows:
            seen.update(row.document_ids[row.kept])
        return seen

    def update(self, batch: ContextBatch) -> None:
        """Add a batch's contexts."""
        tokens, documents = batch.contexts.tokens.cpu(), batch.contexts.document_ids.cpu()
        width = tokens.shape[1]
        activations = batch.contexts.activations.flatten(0, 1)
        kept = batch.kept.cpu()
        owner = kept // width
        numbers = _numbers(tokens, documents, self.seed)
        bound = self._worst()
        for i in owner.unique().tolist():
            if bound is not None and int(numbers[i]) > bound:
                continue
            mine = owner == i
            code = Latents(*(part[mine.to(part.device)].cpu() for part in batch.latents))
            x = activations[kept[mine].to(activations.device)].float().cpu()
            place = kept[mine] % width
            self.rows.append(Row(int(numbers[i]), tokens[i], documents[i], place, x, code))
        self._cut()

    def merge(self, other: ContextSample) -> None:
        """Add another's contexts."""
        self.rows += other.rows
        self._cut()

    def _cut(self) -> None:
        """Keep the lowest numbers: up to the row with which enough tokens are in."""
        self.rows.sort(key=lambda row: row.number)
        n = 0
        for place, row in enumerate(self.rows):
            n += len(row.kept)
            if n >= self.n_tokens:
                del self.rows[place + 1 :]
                return

    def _worst(self) -> int | None:
        """Return the number above which no context comes in; None while there is room."""
        is_full = sum(len(row.kept) for row in self.rows) >= self.n_tokens
        return self.rows[-1].number if is_full else None


@dataclass(frozen=True)
class Tokens:
    """The n unmasked tokens of a sample, row after row.

    Shapes: x (n, Σ widths); code (n, k) each; rows, positions, document_ids, halves, following (n)
    int64: which context, where in it, of which document, its half, and the next token,
    NO_TOKEN where that is masked or of another document.
    """

    x: Tensor
    code: Latents
    rows: Tensor
    positions: Tensor
    document_ids: Tensor
    halves: Tensor
    following: Tensor


def tokens_of(sample: ContextSample) -> Tokens:
    """Return all tokens of a sample that is not empty."""
    rows = sample.rows
    documents = torch.cat([row.document_ids[row.kept] for row in rows])
    return Tokens(
        x=torch.cat([row.x for row in rows]),
        code=joined([row.code for row in rows]),
        rows=torch.cat([torch.full_like(row.kept, i) for i, row in enumerate(rows)]),
        positions=torch.cat([row.kept for row in rows]),
        document_ids=documents,
        halves=mixed(documents + wrapped((sample.seed + 1) * STEP)) & 1,
        following=torch.cat([_following(row) for row in rows]),
    )


def _following(row: Row) -> Tensor:
    """Return the token after each kept one, (n)."""
    is_kept = torch.zeros(len(row.tokens), dtype=torch.bool)
    is_kept[row.kept] = True
    found = torch.full_like(row.tokens, NO_TOKEN)
    same = row.document_ids[1:] == row.document_ids[:-1]
    found[:-1] = row.tokens[1:].where(same & is_kept[1:], NO_TOKEN)
    return found[row.kept]


def _numbers(tokens: Tensor, documents: Tensor, seed: int) -> Tensor:
    """Return each context's pseudorandom number, (b) int64, at least 0."""
    number = torch.full((len(tokens),), wrapped(seed * STEP), dtype=torch.int64)
    for column, ids in zip(tokens.unbind(1), documents.unbind(1), strict=True):
        number = mixed(number + column + ids * STEP)
    return number.bitwise_and(2**62 - 1)
