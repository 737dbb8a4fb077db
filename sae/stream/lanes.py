"""One lane of a stream: its rows, its buffer, and the block on its way from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae.stream.buffer import Rows, ShuffleBuffer
from sae.stream.rows import Block, RowStream
from sae.stream.source import require_finite

PENDING = "pending"
BUFFER = "buffer"


class Lane:
    """A stream and its buffer.

    Attributes:
        max_norm: rows of larger norm, at the first hookpoint and in raw units, are left out.
        n_rows, n_squared: rows put in the first pass over the text, and Σ (rows of a document)²
            of it: what batches drawn from all of it would be like.
    """

    def __init__(self, stream: RowStream, buffer: ShuffleBuffer):
        self.stream, self.buffer = stream, buffer
        self.max_norm: float | None = None
        self.n_rows, self.n_squared, self._run = 0, 0, (-1, 0)
        self._block: Block | None = None
        self._used = 0

    def make(self) -> None:
        """Have a block at hand: the rest of the last one, or the next of the stream.

        Errors: ValueError where the text ends before the buffer was filled once, or where no row
        of a whole pass counts.
        """
        began = self.stream.epoch
        while self._block is None:
            if self.stream.epoch > began + 1:
                raise ValueError(
                    "`data.max_norm_ratio` must leave some tokens; in a whole pass no norm is at "
                    f"most {self.max_norm}. Raise it."
                )
            self._require_enough_text()
            block = self._not_set_aside(self._within_norm(self.stream.next_block()))
            for name, rows in zip(self.stream.names, block.rows, strict=True):
                require_finite(rows, name, "of one block")
            if len(block.documents):
                self._block, self._used = block, 0

    @property
    def n_fitting(self) -> int:
        """Rows of the block that fit into the buffer."""
        left = len(self._block.documents) - self._used if self._block is not None else 0
        return min(self.buffer.room, left)

    def put(self, n: int) -> None:
        """Move n rows of the block, at most `n_fitting`, into the buffer; `filled` counts them."""
        block = self._block
        assert block is not None, "`make` comes first"
        part = slice(self._used, self._used + n)
        self.buffer.put(tuple(rows[part] for rows in block.rows), block.documents[part])
        if self.stream.epoch == 0:
            self._count(block.documents[part])
        self._used += n
        if self._used == len(block.documents):
            self._block = None

    def filled(self, n: int) -> None:
        """Count the n rows that were moved."""
        self.buffer.filled(n)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the place as plain JSON, and the tensors that cannot be made again."""
        position = {
            "stream": self.stream.state_dict(),
            "buffer": self.buffer.position_dict(),
            "max_norm": self.max_norm,
            "documents": [self.n_rows, self.n_squared, *self._run],
        }
        tensors = {f"{BUFFER}.{name}": tensor for name, tensor in self.buffer.tensors().items()}
        if self._block is not None:
            rest = (*self._block.rows, self._block.documents)
            # A copy: the file would otherwise hold the whole of the block.
            tensors |= {f"{PENDING}.{i}": part[self._used :].clone() for i, part in enumerate(rest)}
        return position, tensors

    def load(self, position: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue bit for bit from a saved place."""
        self.stream.load_state_dict(position["stream"])
        self.max_norm = position["max_norm"]
        self.n_rows, self.n_squared, *run = position["documents"]
        self._run = (run[0], run[1])
        names = self.buffer.tensors()
        saved = {name: tensors[f"{BUFFER}.{name}"] for name in names}
        self.buffer.load(position["buffer"], saved)
        self._block, self._used = None, 0
        if f"{PENDING}.0" in tensors:
            *rows, documents = (tensors[f"{PENDING}.{i}"] for i in range(len(names)))
            self._block = Block(tuple(rows), documents)

    def _within_norm(self, block: Block) -> Block:
        if self.max_norm is None:
            return block
        is_kept = norms(block.rows[0]) <= self.max_norm
        rows: Rows = tuple(part[is_kept] for part in block.rows)
        return Block(rows, block.documents[is_kept.to(block.documents.device)])

    def _not_set_aside(self, block: Block) -> Block:
        """Leave out documents of which rows are set aside, when they come again."""
        if self.buffer.reserved == 0 or self.stream.epoch == 0:
            return block
        is_new = ~torch.isin(block.documents, self.buffer.documents[: self.buffer.reserved])
        rows: Rows = tuple(part[is_new.to(part.device)] for part in block.rows)
        return Block(rows, block.documents[is_new])

    def _count(self, documents: Tensor) -> None:
        """Add to Σ (rows of a document)²; a document's rows follow each other."""
        ids, counts = torch.unique_consecutive(documents, return_counts=True)
        last, in_run = self._run
        for document, n in zip(ids.tolist(), counts.tolist(), strict=True):
            before = in_run if document == last else 0
            self.n_squared += (before + n) ** 2 - before**2
            last, in_run = document, before + n
        self._run = (last, in_run)
        self.n_rows += len(documents)

    def _require_enough_text(self) -> None:
        """Refuse text whose first epoch ends before the buffer is full: it would hold copies."""
        if self.buffer.is_filled or self.stream.epoch == 0 or self.buffer.written == 0:
            return
        n_filled, capacity = self.buffer.written, self.buffer.capacity
        raise ValueError(
            f"`data.source` must fill the buffer of {capacity} tokens once; all its training "
            f"documents give only about {n_filled} kept tokens, {capacity - n_filled} too few. "
            f"Give more text, or set `stream.buffer_tokens` to at most {n_filled}."
        )


def norms(rows: Tensor) -> Tensor:
    """Return the norm of each row, (n,) float32, without a float32 copy of the rows on a GPU."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
