"""Reading ahead in threads: the consumer finds what it needs next already in memory.

The items and their order are the consumer's; timing decides only who waits. An error in a thread is
raised in the consumer, with the thread's traceback. The threads end when the consumer is closed or
dropped, as those of a `ThreadPoolExecutor` do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prefetched(Generic[Item, Result]):
    """What `read` gives for each of the endless `items`, in their order.

    Args:
        read: called in the threads, for several items at once. It must not hold a reference to the
            consumer, whose threads would never end.
        ahead: items that are read, or being read, before they are asked for.
    """

    def __init__(
        self,
        read: Callable[[Item], Result],
        items: Iterator[Item],
        *,
        ahead: int,
        threads: int = 2,
    ) -> None:
        self._read, self._items = read, items
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sae-prefetch")
        self._error: BaseException | None = None
        self._under_way: deque[tuple[Item, Future[Result]]] = deque()
        for _ in range(ahead):
            self._begin_next()

    def __next__(self) -> tuple[Item, Result]:
        """Return the next item and what was read for it.

        Errors: what `read` raised, now and at every later call.
        """
        if self._error is not None:
            raise self._error
        item, reading = self._under_way.popleft()
        try:
            result = reading.result()
        except BaseException as error:
            self._error = error
            raise
        self._begin_next()
        return item, result

    def close(self) -> None:
        """End the threads and wait for their end."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin_next(self) -> None:
        item = next(self._items)
        self._under_way.append((item, self._pool.submit(self._read, item)))
