"""The shuffle buffer: rows go in as the model makes them and come out mixed.

The buffer works in cycles. A cycle picks R = refill_fraction · capacity slots at random, hands
their rows out `reuse` times over, each time in a new order, and then replaces them. With reuse 1
and half the buffer replaced this is the usual shuffle buffer: a row waits a random number of
cycles, so neighbours in the text part ways.

Which rows come when is a pure function of (seed, cycle, position): the permutations are made once a
cycle, and a batch is one gather. Knows nothing of models or text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FillRows = Callable[[int], Tensor]


class ShuffleBuffer:
    """Hand out rows of (capacity, width) storage in mixed order.

    Args:
        fill: gives the next n rows, (n, width), whenever the buffer needs them.
        capacity, width: rows held, and their width.
        reuse: times that each row is handed out. refill_fraction: share replaced a cycle.
    """

    def __init__(
        self,
        fill: FillRows,
        capacity: int,
        width: int,
        *,
        seed: int,
        reuse: int = 1,
        refill_fraction: float = 0.5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.fill, self.capacity, self.seed, self.reuse = fill, capacity, seed, reuse
        self.rows_replaced = max(1, round(capacity * refill_fraction))
        self.storage = torch.empty(capacity, width, dtype=dtype, device=device)
        self.is_filled = False
        self.cycle, self.position = 0, 0
        self._slots, self._order = self._plan(0)

    def warm_up(self) -> None:
        """Fill the buffer, unless it is."""
        if not self.is_filled:
            self._write(torch.arange(self.capacity))
            self.is_filled = True

    def next_batch(self, n: int) -> Tensor:
        """Return the next n rows, (n, width), as a new tensor."""
        self.warm_up()
        parts = []
        while n > 0:
            if self.position == len(self._order):
                self._refill()
            taken = self._order[self.position : self.position + n]
            parts.append(self.storage[taken])
            self.position += len(taken)
            n -= len(taken)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def position_dict(self) -> dict[str, int]:
        """Return where the buffer stands; with `storage` it is the whole state."""
        return {"cycle": self.cycle, "position": self.position, "is_filled": int(self.is_filled)}

    def load(self, position: Mapping[str, int], storage: Tensor) -> None:
        """Continue from a saved state, bit for bit.

        Errors: ValueError where the storage has another shape.
        """
        wanted, given = (
            (tuple(s.shape), str(s.dtype).removeprefix("torch.")) for s in (self.storage, storage)
        )
        if given != wanted:
            raise ValueError(
                f"the saved buffer must have shape and dtype {wanted}; got {given}. "
                "Resume with the `stream` settings of the saved run."
            )
        self.storage.copy_(storage)
        self.is_filled = bool(position["is_filled"])
        self.cycle, self.position = position["cycle"], position["position"]
        self._slots, self._order = self._plan(self.cycle)

    def _refill(self) -> None:
        self._write(self._slots)
        self.cycle, self.position = self.cycle + 1, 0
        self._slots, self._order = self._plan(self.cycle)

    def _write(self, slots: Tensor) -> None:
        """Fill `slots` piece by piece, so that no second copy of the buffer is ever held."""
        done = 0
        while done < len(slots):
            rows = self.fill(len(slots) - done)
            target = slots[done : done + len(rows)].to(self.storage.device)
            self.storage[target] = rows.to(self.storage.device, self.storage.dtype)
            done += len(rows)

    def _plan(self, cycle: int) -> tuple[Tensor, Tensor]:
        """Return the slots of a cycle and the order in which their rows are handed out."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (cycle + 1))
        slots = torch.randperm(self.capacity, generator=generator)[: self.rows_replaced]
        passes = [slots[torch.randperm(len(slots), generator=generator)] for _ in range(self.reuse)]
        return slots, torch.cat(passes).to(self.storage.device)
