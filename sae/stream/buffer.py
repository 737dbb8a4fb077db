"""The shuffle buffer: rows go in as they are made and come out mixed.

The buffer works in cycles. A cycle picks R = refill_fraction · capacity slots at random and hands
their rows out `reuse` times over, each time in a new order. Each row of the last of these passes
frees its slot for the next row of the stream, which comes out from the next cycle on. So batches do
not depend on how soon a free slot is filled: at the cycle's end, or meanwhile by another thread.

With reuse 1 and half the buffer replaced this is the usual shuffle buffer: a row waits a random
number of cycles, so neighbours in the text part ways. The first `reserved` slots keep what filled
them and hand nothing out. Which rows come when is a pure function of
(seed, cycle, position): the permutations are made once a cycle, and a batch is one gather. Knows
nothing of models or text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]
DOCUMENTS = "documents"


class ShuffleBuffer:
    """Rows of one or several hookpoints, which stay together, in `capacity` slots.

    One thread may `put` while another takes; `turn` needs both at rest.

    Args:
        widths, dtypes: of each hookpoint's rows.
        reuse: times that each row is handed out. refill_fraction: share replaced a cycle.
        reserved: slots whose rows are set aside, of capacity.

    Attributes:
        storage: (capacity, width) a hookpoint. documents: (capacity) int64 on CPU, where the row in
            each slot is from. cycle: −1 while the buffer is filled for the first time.
    """

    def __init__(
        self,
        capacity: int,
        widths: Sequence[int],
        dtypes: Sequence[torch.dtype],
        *,
        seed: int,
        reuse: int = 1,
        refill_fraction: float = 0.5,
        reserved: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.capacity, self.seed, self.reuse = capacity, seed, reuse
        if not 0 <= reserved < capacity:
            raise ValueError(
                f"`stream.reserved_tokens` must be below the buffer's {capacity} tokens; got "
                f"{reserved}. Lower it or raise `stream.buffer_tokens`."
            )
        self.reserved = reserved
        self.rows_replaced = max(1, round((capacity - reserved) * refill_fraction))
        self.device = torch.device(device)
        # A GPU reads what lies in page-locked memory without waiting for the host.
        self.is_pinned = self.device.type == "cpu" and torch.cuda.is_available()
        self.storage = tuple(
            _room(capacity, width, dtype, self.device, self.is_pinned)
            for width, dtype in zip(widths, dtypes, strict=True)
        )
        self.documents = torch.full((capacity,), -1, dtype=torch.int64)
        self.last_documents = self.documents[:0]
        self._begin(-1)

    @property
    def is_filled(self) -> bool:
        """Whether every slot has been filled once."""
        return self.cycle >= 0

    @property
    def room(self) -> int:
        """Free slots."""
        return max(0, self.position - self._first_freeing) - self.written

    @property
    def is_spent(self) -> bool:
        """Whether the cycle has handed out all that it can."""
        return self.position == len(self._order)

    def put(self, rows: Rows, documents: Tensor) -> None:
        """Fill as many free slots as there are rows, (n, width) a hookpoint; n at most `room`.

        They are full once `filled` is told.
        """
        slots = self._freed[self.written : self.written + len(documents)]
        there = slots.to(self.device, non_blocking=True)
        for storage, new in zip(self.storage, rows, strict=True):
            storage.index_copy_(0, there, new.to(self.device, storage.dtype))
        self.documents[slots] = documents

    def filled(self, n: int) -> None:
        """Count the n slots that `put` filled last."""
        self.written += n

    def take(self, n: int) -> Rows:
        """Return the next rows as new tensors, n or what the cycle still has.

        Their slots are free once `taken` is told.
        """
        slots = self._order[self.position : self.position + n]
        self.last_documents = self.documents[slots]
        there = self._order_there[self.position : self.position + n]
        return tuple(self._gather(storage, there) for storage in self.storage)

    def taken(self, n: int) -> None:
        """Free the slots of the n rows that were taken last."""
        self.position += n

    def turn(self) -> None:
        """Begin the next cycle: all is handed out, and all that was freed is filled."""
        assert self.is_spent
        assert self.room == 0
        self._begin(self.cycle + 1)

    def set_aside(self) -> Rows:
        """Return the rows of the reserved slots, (reserved, width) a hookpoint."""
        return tuple(storage[: self.reserved] for storage in self.storage)

    def position_dict(self) -> dict[str, int]:
        """Return where the buffer stands; with `tensors` it is the whole state."""
        return {"cycle": self.cycle, "position": self.position, "written": self.written}

    def tensors(self) -> dict[str, Tensor]:
        """Return what it holds, by name; live tensors, not copies."""
        return {str(i): s for i, s in enumerate(self.storage)} | {DOCUMENTS: self.documents}

    def load(self, position: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a saved state, bit for bit.

        Errors: ValueError where the storage has another shape.
        """
        for name, mine in self.tensors().items():
            saved = tensors[name]
            given, wanted = ((tuple(t.shape), str(t.dtype)) for t in (saved, mine))
            if given != wanted:
                raise ValueError(
                    f"the saved buffer must have shape and dtype {wanted}; got {given}. "
                    "Resume with the `stream` settings of the saved run."
                )
            mine.copy_(saved)
        self._begin(position["cycle"])
        self.position, self.written = position["position"], position["written"]

    def _gather(self, storage: Tensor, slots: Tensor) -> Tensor:
        if not self.is_pinned:
            return storage.index_select(0, slots)
        shape = (len(slots), storage.shape[1])
        batch = torch.empty(shape, dtype=storage.dtype, pin_memory=True)
        return torch.index_select(storage, 0, slots, out=batch)

    def _begin(self, cycle: int) -> None:
        """Plan a cycle: in which order rows come, and in which slots are freed by it."""
        self.cycle, self.position, self.written = cycle, 0, 0
        if cycle < 0:  # nothing to hand out yet, and every slot is free
            self._order, self._freed = (
                torch.empty(0, dtype=torch.int64),
                torch.arange(self.capacity),
            )
            self._first_freeing = -self.capacity
        else:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (cycle + 1))
            shuffled = torch.randperm(self.capacity - self.reserved, generator=generator)
            slots = shuffled[: self.rows_replaced] + self.reserved
            passes = [
                slots[torch.randperm(len(slots), generator=generator)] for _ in range(self.reuse)
            ]
            self._order, self._freed = torch.cat(passes), passes[-1]
            self._first_freeing = len(self._order) - len(slots)
        self._order_there = self._order.to(self.device)


def _room(
    capacity: int, width: int, dtype: torch.dtype, device: torch.device, is_pinned: bool
) -> Tensor:
    """Return the empty slots of one hookpoint, (capacity, width).

    Errors: RuntimeError where there is no memory for them.
    """
    try:
        return torch.empty(capacity, width, dtype=dtype, device=device, pin_memory=is_pinned)
    except RuntimeError as error:
        size = capacity * width * dtype.itemsize / 1e9
        raise RuntimeError(
            f"the shuffle buffer must fit into the memory of {device}; {capacity:,} tokens of "
            f"width {width} in {dtype} take {size:.1f} GB. Lower `stream.buffer_tokens`, or set "
            "`stream.dtype: bfloat16`."
        ) from error
