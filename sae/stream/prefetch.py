"""Reading ahead in a thread: the consumer finds what it needs next already in memory.

The items and their order are the iterator's; timing decides only who waits. An error in the thread
is raised in the consumer, with the thread's traceback. The thread ends when the consumer is closed
or dropped.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class Prefetched(Generic[T]):
    """The items of an endless iterator, at most `ahead` of them read before they are asked for.

    The iterator must not hold a reference to the consumer: its thread would never end.
    """

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._error: BaseException | None = None
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_read, args=(items, self._queue, stop), daemon=True, name="sae-prefetch"
        )
        self._thread.start()
        self._stop = weakref.finalize(self, stop.set)

    def __next__(self) -> T:
        """Return the next item.

        Errors: what the iterator raised, now and at every later call.
        """
        if self._error is not None:
            raise self._error
        item = self._get()
        if isinstance(item, _Failure):
            self._error = item.error
            raise item.error
        return item

    def close(self) -> None:
        """End the thread and wait for its end."""
        self._stop()
        self._thread.join()

    def _get(self) -> Any:
        while True:
            is_dead = not self._thread.is_alive()  # before the look: its last words come first
            try:
                return self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if is_dead:
                    raise RuntimeError(
                        "the thread that reads ahead must live as long as its consumer; it ended "
                        "without an error. Start the run again."
                    ) from None


def _read(items: Iterator[Any], out: queue.Queue[Any], stop: threading.Event) -> None:
    """Put each item, or the error that ended them."""
    try:
        for item in items:
            if not _put(item, out, stop):
                return
    except BaseException as error:
        _put(_Failure(error), out, stop)


def _put(item: Any, out: queue.Queue[Any], stop: threading.Event) -> bool:
    """Wait for room; say False where nobody wants the item any more."""
    while not stop.is_set():
        try:
            out.put(item, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
        return True
    return False
