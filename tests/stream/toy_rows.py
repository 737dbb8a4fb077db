"""A stream whose rows say what they are, and the one harness that resumes any source."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sae.config import StreamConfig
from sae.stream.buffered import BufferedSource
from sae.stream.rows import Block, RowStream
from sae.stream.source import ActivationSource, SourceState

CPU = torch.device("cpu")


class CountingRows:
    """Row t of lane i is t + i/16 in all of its numbers; documents of `per_document` rows.

    Args:
        epoch_rows: rows of one pass. delay: seconds that a block takes at most, at random.
        breaks_at: the block whose making fails.
    """

    def __init__(
        self,
        lane: int = 0,
        *,
        piece: int = 7,
        widths: Sequence[int] = (2,),
        per_document: int = 10,
        epoch_rows: int = 10**9,
        delay: float = 0.0,
        breaks_at: int | None = None,
    ):
        self.lane, self.piece, self.widths = lane, piece, tuple(widths)
        self.names = tuple(f"hook.{i}" for i in range(len(self.widths)))
        self.dtypes = (torch.float32,) * len(self.widths)
        self.per_document, self.epoch_rows = per_document, epoch_rows
        self.delay, self.breaks_at, self.made = delay, breaks_at, 0

    @property
    def epoch(self) -> int:
        return max(0, self.made - 1) // self.epoch_rows

    def next_block(self) -> Block:
        if self.breaks_at is not None and self.made >= self.breaks_at * self.piece:
            raise OSError("the disk went away")
        if self.delay:
            time.sleep(self.delay * float(torch.rand(())))
        block = self._block(self.made)
        self.made += self.piece
        return block

    def sample(self) -> Block:
        return self._block(0)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]

    def token_counts(self) -> dict[str, float]:
        return {"read": 4 * self.made, "bos": self.made}

    def weights(self) -> list[Tensor]:
        return []

    def metadata(self) -> dict[str, object]:
        return {"hook_name": self.names[0]}

    def _block(self, start: int) -> Block:
        numbers = torch.arange(start, start + self.piece)
        rows = tuple((numbers + self.lane / 16)[:, None].expand(-1, w) for w in self.widths)
        in_epoch = numbers % self.epoch_rows
        return Block(rows, in_epoch // self.per_document * 16 + self.lane)


def buffered(
    streams: dict[int, RowStream] | RowStream, capacity: int = 40, **settings: Any
) -> BufferedSource:
    """Return a source over toy streams; `settings` are those of `stream`."""
    streams = streams if isinstance(streams, dict) else {0: streams}
    seed, ratio = settings.pop("seed", 3), settings.pop("max_norm_ratio", None)
    cfg = StreamConfig(buffer_tokens=capacity, **settings)
    return BufferedSource(streams, cfg, context_size=8, seed=seed, device=CPU, max_norm_ratio=ratio)


def ids(rows: Tensor) -> list[float]:
    """Return what each row says that it is."""
    return rows[:, 0].tolist()


def saved(source: ActivationSource) -> SourceState:
    """Return a source's state as a file would give it back."""
    state = source.state()
    tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    return SourceState(json.loads(json.dumps(state.position)), tensors)


def assert_resumes_exactly(
    make: Callable[[], ActivationSource], *, batch: int, stops: Sequence[int], n_after: int = 6
) -> None:
    """Compare the batches behind each stop with those of a source that begins with its state.

    The state is taken while the source goes on afterwards, so taking it must change nothing either.
    """
    whole, plain = make(), make()
    expected = [whole.next_rows(batch) for _ in range(max(stops) + n_after)]
    for stop in range(max(stops) + 1):
        if stop in stops:
            again = make()
            again.load_state(saved(plain))
            for number in range(stop, stop + n_after):
                for one, other in zip(again.next_rows(batch), expected[number], strict=True):
                    assert torch.equal(one, other), f"batch {number} after a stop at {stop}"
            again.close()
        for one, other in zip(plain.next_rows(batch), expected[stop], strict=True):
            assert torch.equal(one, other)
    whole.close()
    plain.close()
