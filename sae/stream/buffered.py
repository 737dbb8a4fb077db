"""A source for the trainer: lanes of rows, each mixed by its own buffer.

The text is cut into `n_lanes` lanes; lane i is the same whichever process runs it. A batch takes
equally many rows of every lane, lane by lane, so that a run goes on with the same batches on any
number of processes that divides the lanes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sae.config import StreamConfig
from sae.stream.buffer import Rows, ShuffleBuffer
from sae.stream.lanes import Lane, norms
from sae.stream.mixing import mixing
from sae.stream.refill import InlineRefill, ThreadRefill
from sae.stream.rows import RowStream
from sae.stream.source import SourceState

DEFAULT_BUFFER_TOKENS = 131_072
MIN_CONTEXTS_IN_BUFFER = 64


def buffer_tokens(cfg: StreamConfig, context_size: int) -> int:
    """Return a lane's buffer in tokens that `cfg` means."""
    return cfg.buffer_tokens or max(DEFAULT_BUFFER_TOKENS, MIN_CONTEXTS_IN_BUFFER * context_size)


def side_by_side(rows: Rows) -> Tensor:
    """Return a token's rows at all hookpoints as one, (n, Σ widths); not copied where there is one
    hookpoint."""
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


class BufferedSource:
    """Shuffled rows of one or several hookpoints; an `ActivationSource`.

    Args:
        streams: this process's lanes, by number; all of the same hookpoints.
        max_norm_ratio: drop rows whose norm exceeds this multiple of the sample's median.
        device: where batches are needed. over_ranks: averages a number over the processes that
            train together.
    """

    def __init__(
        self,
        streams: Mapping[int, RowStream],
        cfg: StreamConfig,
        *,
        context_size: int,
        seed: int,
        device: torch.device,
        max_norm_ratio: float | None = None,
        over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    ):
        self.device, self.over_ranks, self.max_norm_ratio = device, over_ranks, max_norm_ratio
        first = next(iter(streams.values()))
        self.names, self.widths = first.names, first.widths
        self.name = " + ".join(first.names)
        self.dtypes = tuple(
            dtype if cfg.dtype == "auto" else getattr(torch, cfg.dtype) for dtype in first.dtypes
        )

        def lane(number: int) -> Lane:
            buffer = ShuffleBuffer(
                buffer_tokens(cfg, context_size),
                self.widths,
                self.dtypes,
                seed=seed * 1009 + number,
                reuse=cfg.reuse,
                refill_fraction=cfg.refill_fraction,
                reserved=cfg.reserved_tokens if number == 0 else 0,
                device=device if cfg.device == "auto" else torch.device(cfg.device),
            )
            return Lane(streams[number], buffer)

        self.lanes = {number: lane(number) for number in sorted(streams)}
        lanes = list(self.lanes.values())
        is_threaded = device.type == "cuda" if cfg.refill == "auto" else cfg.refill == "thread"
        self.refill = ThreadRefill(lanes) if is_threaded else InlineRefill()
        self.waited_seconds, self._logged = 0.0, (time.monotonic(), 0.0)

    def warm_up(self, tell: Callable[[int, int], None]) -> None:
        """Fill the buffers, telling (rows ready, rows needed) after every block."""
        buffers = [lane.buffer for lane in self.lanes.values()]
        needed = sum(buffer.capacity for buffer in buffers)

        def told() -> None:
            tell(sum(b.capacity if b.is_filled else b.written for b in buffers), needed)

        for lane in self.lanes.values():
            if not lane.buffer.is_filled:
                self.refill.complete(lane, told)
                self.refill.turn(lane)
        self._logged = (time.monotonic(), self.waited_seconds)

    def next_batch(self, n: int) -> Tensor:
        """Return the next n rows, (n, Σ widths), in the hookpoints' dtype."""
        return side_by_side(self.next_rows(n))

    def next_rows(self, n: int) -> Rows:
        """Return the next n rows of every hookpoint, (n, width) each; row i is of one token.

        Errors: ValueError where n is no multiple of this process's lanes.
        """
        if n % len(self.lanes):
            raise ValueError(
                f"rows must be asked for in multiples of the {len(self.lanes)} lanes; got {n}. "
                "Set `train.batch_tokens` or `stream.lanes` so that they divide."
            )
        parts = [
            part for lane in self.lanes.values() for part in self._take(lane, n // len(self.lanes))
        ]
        # Moved before they are joined, which page-locked rows are no longer once they are.
        there = [
            [rows.to(self.device, non_blocking=True) for rows in column]
            for column in zip(*parts, strict=True)
        ]
        return tuple(rows[0] if len(rows) == 1 else torch.cat(rows) for rows in there)

    def calibration_sample(self) -> Tensor:
        """Return rows (m, Σ widths) to calibrate by."""
        return side_by_side(self.calibration_rows())

    def calibration_rows(self) -> Rows:
        """Return rows of every hookpoint, float32 on CPU, from the beginning of each lane.

        Sets the norm filter from them. The source does not move.
        """
        samples = [lane.stream.sample().rows for lane in self.lanes.values()]
        if self.max_norm_ratio is not None:
            medians = torch.stack([norms(rows[0]).median().cpu() for rows in samples])
            median = self.over_ranks(medians.mean().to(self.device))
            for lane in self.lanes.values():
                lane.max_norm = self.max_norm_ratio * float(median)
        sample = tuple(torch.cat(rows).cpu().float() for rows in zip(*samples, strict=True))
        is_kept = norms(sample[0]) <= (self.max_norm or float("inf"))
        return sample if is_kept.all() else tuple(rows[is_kept] for rows in sample)

    def reserved_rows(self) -> Tensor | None:
        """Return rows (m, Σ widths), in raw units, that training never sees: those that the first
        lane has set aside. None where this process has none."""
        lane = self.lanes.get(0)
        if lane is None or lane.buffer.reserved == 0 or not lane.buffer.is_filled:
            return None
        return side_by_side(lane.buffer.set_aside())

    @property
    def max_norm(self) -> float | None:
        """The largest norm of rows handed out, in raw units; None where there is no limit."""
        return next(iter(self.lanes.values())).max_norm

    def state(self) -> SourceState:
        """Return every lane's place in its text, its buffer, and rows made but not yet stored."""
        position, tensors = {}, {}
        with self.refill.paused():
            for number, lane in self.lanes.items():
                position[str(number)], of_lane = lane.state()
                tensors |= {f"lane_{number}.{name}": tensor for name, tensor in of_lane.items()}
        return SourceState({"lanes": position}, tensors)

    def load_state(self, state: SourceState) -> None:
        """Continue bit for bit from a saved place, which may hold other processes' lanes too.

        Errors: ValueError where it holds another number of lanes, or those of another stream.
        """
        with self.refill.paused():
            for number, lane in self.lanes.items():
                prefix = f"lane_{number}."
                saved = {
                    name.removeprefix(prefix): state.tensors[name]
                    for name in state.tensors
                    if name.startswith(prefix)
                }
                lane.load(state.position["lanes"][str(number)], saved)

    def metadata(self) -> dict[str, object]:
        """Return what a dictionary should remember of its origin."""
        stream = next(iter(self.lanes.values())).stream
        return {**stream.metadata(), "max_norm": self.max_norm}

    def log_values(self) -> dict[str, float]:
        """Return what the log says of the stream since the last call.

        wait_share: share of the time for which the trainer waited for rows. masked_REASON: share of
        all tokens read so far that were left out for a reason. See `mixing` for the others.
        """
        now, (then, waited) = time.monotonic(), self._logged
        self._logged = (now, self.waited_seconds)
        share = (self.waited_seconds - waited) / max(now - then, 1e-9)
        return {"wait_share": share, **self._masked(), **mixing(list(self.lanes.values()))}

    def model_bytes(self, device: torch.device) -> int:
        """Return the bytes of the models' weights on a kind of device."""
        stream = next(iter(self.lanes.values())).stream
        weights = {w.data_ptr(): w for w in stream.weights() if w.device.type == device.type}
        return sum(w.nbytes for w in weights.values())

    def close(self) -> None:
        """End the thread that fills the buffers, where there is one."""
        self.refill.close()

    def _masked(self) -> dict[str, float]:
        counts: Counter[str] = Counter()
        for lane in self.lanes.values():
            counts.update(lane.stream.token_counts())
        n = counts.pop("read", 0)
        return {f"masked_{reason}": count / n for reason, count in counts.items()} if n else {}

    def _take(self, lane: Lane, n: int) -> list[Rows]:
        parts = []
        while n > 0:
            if lane.buffer.is_spent:
                started = time.monotonic()
                self.refill.complete(lane)
                self.waited_seconds += time.monotonic() - started
                self.refill.turn(lane)
            parts.append(self.refill.take(lane, n))
            n -= len(parts[-1][0])
        return parts
