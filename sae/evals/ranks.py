"""Several processes evaluate one dictionary: who takes what, and how their sums come together.

Every process walks the same batches and evaluates each `size`-th, so that a batch is the same
wherever it runs; at the end their accumulators are merged on the first, which computes and writes.
Metrics do not depend on how tokens were split, so they are those of one process.

What travels is an accumulator's own state: all but what every process makes for itself (its setup,
dictionary, world, model, judge), in whose place the receiver puts its own. The group is gloo's, on
the CPU, also where models are on GPUs: sums are small and are sent once.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from sae.evals.evaluable import Evaluable
from sae.evals.interface import Accumulator, EvalSetup
from sae.evals.judging.judge import Judge
from sae.evals.replacing import Places
from sae.evals.truth import Truth
from sae.stream.language_model import LanguageModel

if TYPE_CHECKING:
    from sae.evals.finishing import Evals

# The first process may convert a model, or ask a judge, while the others wait for it.
PATIENCE = timedelta(hours=3)
OF_EVERY_PROCESS = (EvalSetup, Evaluable, Truth, LanguageModel, Places, Judge, nn.Module)


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """Return those of the group that this process has joined."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def takes(self, batch_number: int) -> bool:
        """Say whether this process evaluates a batch."""
        return batch_number % self.size == self.rank

    def everywhere(self, mine: Any) -> list[Any]:
        """Return what each process gives, by rank, to all of them."""
        if self.size == 1:
            return [mine]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, mine)
        return parts

    def merge_into_first(self, evals: Evals) -> None:
        """Merge every accumulator of the other processes into that of the first."""
        if self.size == 1:
            return
        mine = {name: packed(accumulator) for name, accumulator in evals.items()}
        parts: list[Any] = [None] * self.size
        dist.gather_object(mine, parts if self.is_first else None)
        for sent in parts[1:] if self.is_first else ():
            for name, accumulator in evals.items():
                accumulator.merge(unpacked(sent[name], accumulator))


def join_ranks() -> Ranks:
    """Join the processes that a launcher (torchrun, accelerate) started, where there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(
                int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
            )
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks.here()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process do what the block says before the others, who find it done."""
    ranks = Ranks.here()
    if ranks.size > 1 and not ranks.is_first:
        dist.barrier()
    yield
    if ranks.size > 1 and ranks.is_first:
        dist.barrier()


def packed(accumulator: Accumulator) -> bytes:
    """Return an accumulator's state; what every process has itself is only named."""
    buffer = io.BytesIO()
    _Packer(buffer).dump(accumulator)
    return buffer.getvalue()


def unpacked(state: bytes, mine: Accumulator) -> Accumulator:
    """Return the accumulator of another process, with what `mine` has in place of its names."""
    return _Unpacker(io.BytesIO(state), mine).load()


class _Packer(pickle.Pickler):
    """Writes the name of what every process has, and remembers what it named."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.named: dict[str, Any] = {}

    def persistent_id(self, obj: Any) -> str | None:
        if not isinstance(obj, OF_EVERY_PROCESS):
            return None
        self.named[type(obj).__name__] = obj
        return type(obj).__name__


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, mine: Accumulator) -> None:
        super().__init__(file)
        walk = _Packer(io.BytesIO())  # finds them wherever they hang
        walk.dump(mine)
        self.own = walk.named

    def persistent_load(self, pid: str) -> Any:
        if pid not in self.own:
            raise RuntimeError(
                f"every process must hold the {pid} that an accumulator names; this one has "
                f"{sorted(self.own)}. Make it in the accumulator's own start."
            )
        return self.own[pid]
