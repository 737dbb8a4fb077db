"""Who fills the free slots of the buffers: the trainer between two cycles, or a thread meanwhile.

Batches are the same either way (see `buffer`). On a GPU the thread works on a CUDA stream of its
own; events keep it from overwriting rows before they are read, and the trainer from reading rows
before they are written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from sae.stream.buffer import Rows
from sae.stream.lanes import Lane

Tell = Callable[[], None]


class InlineRefill:
    """Fill the buffers in the caller's thread, when a cycle is spent."""

    def complete(self, lane: Lane, tell: Tell | None = None) -> None:
        """Return once a spent cycle's slots are all filled, telling after every block."""
        while lane.buffer.room:
            lane.make()
            n = lane.n_fitting
            lane.put(n)
            lane.filled(n)
            if tell is not None:
                tell()

    def turn(self, lane: Lane) -> None:
        """Begin the lane's next cycle."""
        lane.buffer.turn()

    def take(self, lane: Lane, n: int) -> Rows:
        """Return n rows, or what the cycle still has."""
        rows = lane.buffer.take(n)
        lane.buffer.taken(len(rows[0]))
        return rows

    def paused(self) -> AbstractContextManager[None]:
        """Keep blocks from moving while the state is read or replaced."""
        return nullcontext()

    def close(self) -> None:
        """Do nothing: there is no thread."""


class ThreadRefill:
    """Fill the buffers in a thread, as slots are freed, at most one block a lane ahead."""

    def __init__(self, lanes: Sequence[Lane]):
        self.lanes = lanes
        self._changed = threading.Condition()  # slots were freed or filled, or the thread ended
        self._moving = threading.Lock()  # held while a block is made or moved
        self._error: BaseException | None = None
        self._is_closed = False
        self._streams = _Streams(lanes)
        self._thread = threading.Thread(target=self._work, name="sae-refill", daemon=True)

    def complete(self, lane: Lane, tell: Tell | None = None) -> None:
        """Return once a spent cycle's slots are all filled, telling after every block.

        Errors: what the thread met.
        """
        if self._thread.ident is None:
            self._thread.start()
        while lane.buffer.room:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news(lane), timeout=1.0)
            self._raise_its_error()
            if tell is not None:
                tell()

    def turn(self, lane: Lane) -> None:
        """Begin the lane's next cycle; its rows are read behind the last write on the device."""
        with self._changed:
            self._streams.read_after_writes()
            lane.buffer.turn()

    def take(self, lane: Lane, n: int) -> Rows:
        """Return n rows, or what the cycle still has."""
        self._raise_its_error()
        rows = lane.buffer.take(n)
        with self._changed:
            self._streams.note_read()
            lane.buffer.taken(len(rows[0]))
            self._changed.notify_all()
        return rows

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep blocks from moving while the state is read or replaced."""
        with self._moving:
            self._streams.finish()
            yield
            self._streams.go_on()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread, after the block it is making."""
        self._is_closed = True
        with self._changed:
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            with self._streams.own():
                while not self._is_closed:
                    self._step()
        except BaseException as error:  # the trainer raises it, whatever it is
            self._error = error
        finally:
            with self._changed:
                self._changed.notify_all()

    def _step(self) -> None:
        """Make a block for the emptiest lane, wait for room, move what fits into every lane."""
        with self._changed:
            emptiest = max(self.lanes, key=lambda lane: lane.buffer.room)
        with self._moving:
            emptiest.make()
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or any(_rooms(self.lanes)))
        with self._moving:
            for lane in self.lanes:
                if not self._is_closed:
                    self._move(lane)

    def _move(self, lane: Lane) -> None:
        with self._changed:  # not while a cycle turns; and none turns before free slots are filled
            if not lane.buffer.room:
                return
        lane.make()
        with self._changed:
            n = lane.n_fitting
            self._streams.write_after_reads()
        lane.put(n)
        with self._changed:
            self._streams.note_write()
            lane.filled(n)
            self._changed.notify_all()

    def _has_news(self, lane: Lane) -> bool:
        return not lane.buffer.room or self._error is not None

    def _raise_its_error(self) -> None:
        if self._error is not None:
            raise self._error
        if self._thread.ident is not None and not self._thread.is_alive():
            raise RuntimeError("the thread that fills the shuffle buffer must live; it ended.")


class _Streams:
    """The order of reads and writes on a GPU; nothing where the buffers lie elsewhere."""

    def __init__(self, lanes: Sequence[Lane]):
        device = lanes[0].buffer.device
        self.device = device if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if self.device else None
        self._read: Any = None
        self._written: Any = None

    def own(self) -> AbstractContextManager[object]:
        """Work on the thread's own CUDA stream."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def note_read(self) -> None:
        """Remember that all reads so far are queued."""
        if self.device:
            self._read = torch.cuda.current_stream(self.device).record_event()

    def write_after_reads(self) -> None:
        """Let what the thread queues from now on wait for the reads noted."""
        if self.device and self._read:
            torch.cuda.current_stream(self.device).wait_event(self._read)

    def note_write(self) -> None:
        """Remember that all writes so far are queued."""
        if self.device:
            self._written = torch.cuda.current_stream(self.device).record_event()

    def finish(self) -> None:
        """Wait until the thread's stream has done all that was queued."""
        if self._stream:
            self._stream.synchronize()

    def go_on(self) -> None:
        """Let what the thread queues from now on wait for all that the caller has queued: copies of
        the thread's block may be among it, whose memory the thread takes for the next one."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def read_after_writes(self) -> None:
        """Let what the caller queues from now on wait for the writes noted."""
        if self.device and self._written:
            torch.cuda.current_stream(self.device).wait_event(self._written)


def _rooms(lanes: Sequence[Lane]) -> list[int]:
    return [lane.buffer.room for lane in lanes]
