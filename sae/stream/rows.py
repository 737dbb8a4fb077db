"""What fills a shuffle buffer: blocks of rows in an order fixed by the seed.

A model gives a block with every forward pass, a folder of shards with every piece it reads. A
stream of blocks may be cut into `n_lanes` lanes, each an own part of the documents with an own
place; lane i of them is the same stream whichever process runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Rows that count (`is_kept`), in the order of their text.

    rows: one (n, d) a hookpoint, n the same, in raw units, on the stream's device.
    documents: (n,) int64 in CPU memory, the index of the document that each row is from.
    """

    rows: tuple[Tensor, ...]
    documents: Tensor


class RowStream(Protocol):
    """Endless blocks of rows; knows its place."""

    names: tuple[str, ...]
    """The hookpoints, in the order of a block's `rows`."""

    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def epoch(self) -> int:
        """Whole passes over the documents before the last block."""
        ...

    def next_block(self) -> Block:
        """Return the next block, which may be empty."""
        ...

    def sample(self) -> Block:
        """Return rows from the beginning, to calibrate by, without moving the stream."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last block, as plain JSON of constant size."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind a saved place, bit for bit.

        Errors: ValueError where it belongs to another stream.
        """
        ...

    def token_counts(self) -> Mapping[str, float]:
        """Return how many tokens were read so far ("read"), and left out for each reason."""
        ...

    def weights(self) -> Iterable[Tensor]:
        """Return the weights of the models that make the rows, for an account of memory."""
        ...

    def metadata(self) -> dict[str, object]:
        """Return what a dictionary should remember of its origin."""
        ...
