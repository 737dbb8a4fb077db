"""Activations that already exist: tensors, arrays, files, iterators of batches.

What fits in memory or lies in a memory-mapped file is shuffled anew each epoch, its order a pure
function of (seed, epoch), and several processes divide every batch of that one order among them. An
iterator is taken in its own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sae.stream.harvested_rows import HarvestedRows
from sae.stream.manifest import is_harvest
from sae.stream.source import SourceState, require_finite

CALIBRATION_ROWS = 16_384


def open_source(activations: Any, *, seed: int = 0, rank: int = 0, world_size: int = 1):
    """Return an `ActivationSource` over a tensor, an array, a path or an iterator of batches.

    Args:
        activations: (n, d_in) tensor or array; a path to .npy, .safetensors (one tensor, or the one
            named `activations`), a folder of such files or one that `sae harvest` wrote; an
            iterable of (n, d_in) batches; or a list of tensors, arrays or paths, one a place, whose
            rows i are of one token.

    Errors: ValueError or TypeError for what is none of these, is empty, or has other axes.
    """
    if isinstance(activations, (list, tuple)) and activations and is_matrix(activations[0]):
        rows, widths = join_places(activations)
        return ArraySource(rows, "activations", seed, rank, world_size, widths)
    if isinstance(activations, (str, Path)):
        return ArraySource(read_rows(Path(activations)), str(activations), seed, rank, world_size)
    if isinstance(activations, Tensor):
        return ArraySource(activations, "activations", seed, rank, world_size)
    if isinstance(activations, np.ndarray) or hasattr(activations, "__array__"):
        rows = torch.from_numpy(np.asarray(activations))
        return ArraySource(rows, "activations", seed, rank, world_size)
    if isinstance(activations, Iterable):
        if world_size > 1:
            raise ValueError(
                "`activations` must be a tensor, an array or a path when several processes train; "
                "got an iterator, which cannot be divided. Save it to a .npy file."
            )
        return IteratorSource(iter(activations))
    raise TypeError(
        "`activations` must be a tensor, an array, a path or an iterator of (n, d_in) batches; "
        f"got {type(activations).__name__}."
    )


class ArraySource:
    """Rows of one (n, d_in) tensor, shuffled anew each epoch; an `ActivationSource`.

    `position` counts the rows of the epoch that all processes have taken: they move together.
    """

    def __init__(
        self,
        rows: Tensor | HarvestedRows,
        name: str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        widths: tuple[int, ...] = (),
    ):
        require_matrix(rows, name)
        if len(rows) < world_size:
            raise ValueError(
                f"`{name}` must hold a row for each of {world_size} processes; it holds "
                f"{len(rows)}. Launch fewer."
            )
        self.rows, self.name, self.widths = rows.detach(), name, widths or (rows.shape[1],)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._begin_epoch(0)
        # Once for all on a GPU: a check per batch would make every step wait.
        if isinstance(rows, Tensor) and rows.is_cuda:
            require_finite(rows, name, "of the data")

    def warm_up(self, tell: Callable[[int, int], None]) -> None:
        """Do nothing: the rows are there."""

    def next_batch(self, n: int) -> Tensor:
        """Return this process's n of the next n · world_size rows, (n, d_in)."""
        self._skip(self.rank * n)
        batch = self.rows[self._take(n)]
        self._skip((self.world_size - 1 - self.rank) * n)
        if not batch.is_cuda:
            require_finite(batch, self.name, "of one batch")
        return batch

    def next_rows(self, n: int) -> tuple[Tensor, ...]:
        """Return `next_batch` as the rows of a single hookpoint."""
        return (self.next_batch(n),)

    def calibration_sample(self) -> Tensor:
        """Return up to 16,384 rows spread over the data."""
        step = max(1, len(self.rows) // CALIBRATION_ROWS)
        sample = self.rows[::step][:CALIBRATION_ROWS].float()
        require_finite(sample, self.name, "of the calibration sample")
        return sample

    def state(self) -> SourceState:
        """Return the place in the data, and which data it is."""
        place = {"epoch": self.epoch, "position": self.position}
        return SourceState({**place, "data": self._identity()})

    def load_state(self, state: SourceState) -> None:
        """Continue bit for bit from a saved place.

        Errors: ValueError where the place is in other data.
        """
        if state.position["data"] != self._identity():
            raise ValueError(
                "a run must be resumed on the data it began with; it began with "
                f"{state.position['data']}, now {self._identity()}."
            )
        self._begin_epoch(state.position["epoch"])
        self.position = state.position["position"]

    def metadata(self) -> dict[str, object]:
        """Return where the rows came from."""
        return {"hook_name": self.name}

    def log_values(self) -> dict[str, float]:
        """Return nothing: rows are there at once, in an order drawn over all of them."""
        return {}

    def close(self) -> None:
        """Do nothing."""

    def _identity(self) -> dict[str, float]:
        """Return what tells one data set from another: its shape and a sum over a sample."""
        shape = {"n_rows": len(self.rows), "d_in": sum(self.widths), "seed": self.seed}
        return {**shape, "sum": float(self.calibration_sample().double().sum())}

    def _take(self, n: int) -> Tensor:
        """Return the indices of the next n rows in the order of all processes."""
        parts = [self._order[:0]]
        while n > 0:
            if self.position == len(self._order):
                self._begin_epoch(self.epoch + 1)
            parts.append(self._order[self.position : self.position + n])
            self.position += len(parts[-1])
            n -= len(parts[-1])
        return torch.cat(parts)

    def _skip(self, n: int) -> None:
        """Pass over the next n rows, which other processes take."""
        while self.position + n > len(self._order):
            n -= len(self._order) - self.position
            self._begin_epoch(self.epoch + 1)
        self.position += n

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        self._order = self._permutation()

    def _permutation(self) -> Tensor:
        """Return the order of the epoch, the same for all processes."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (self.epoch + 1))
        return torch.randperm(len(self.rows), generator=generator).to(self.rows.device)


class IteratorSource:
    """Batches from an iterator, in its own order; an `ActivationSource` that cannot be resumed."""

    def __init__(self, batches: Iterator[Any]):
        self.name, self.batches = "activations", batches
        self.pending = self._pull()
        self.widths = (self.pending.shape[1],)

    def warm_up(self, tell: Callable[[int, int], None]) -> None:
        """Do nothing: the rows are there."""

    def next_batch(self, n: int) -> Tensor:
        """Return the next n rows, (n, d_in).

        Errors: ValueError where the iterator ends early.
        """
        while len(self.pending) < n:
            self.pending = torch.cat([self.pending, self._pull()])
        batch, self.pending = self.pending[:n], self.pending[n:]
        return batch

    def next_rows(self, n: int) -> tuple[Tensor, ...]:
        """Return `next_batch` as the rows of a single hookpoint."""
        return (self.next_batch(n),)

    def calibration_sample(self) -> Tensor:
        """Return up to 16,384 first rows, which stay in line to be trained on."""
        while len(self.pending) < CALIBRATION_ROWS:
            try:
                self.pending = torch.cat([self.pending, self._pull()])
            except EndOfActivationsError:
                break
        return self.pending[:CALIBRATION_ROWS].float()

    def state(self) -> SourceState:
        """Refuse: an iterator's place cannot be saved."""
        raise ValueError(
            "checkpoints need activations that can be read again; got an iterator. "
            "Give a tensor, an array or a path, or train without `folder`."
        )

    def load_state(self, state: SourceState) -> None:  # noqa: ARG002 - the interface
        """Refuse, as `state` does."""
        self.state()

    def metadata(self) -> dict[str, object]:
        """Return nothing: an iterator has no origin."""
        return {}

    def log_values(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """Do nothing."""

    def _pull(self) -> Tensor:
        rows = torch.as_tensor(self._next()).detach()
        require_matrix(rows, self.name)
        require_finite(rows, self.name, "of one batch")
        return rows

    def _next(self) -> Any:
        try:
            return next(self.batches)
        except StopIteration:
            raise EndOfActivationsError(
                "the iterator of activations must last for `tokens` rows; it ended early. "
                "Lower `tokens`, or give an iterator that begins anew."
            ) from None


class EndOfActivationsError(ValueError):
    """An iterator ended before the run did."""


def is_matrix(given: Any) -> bool:
    """Say whether something is what one place's rows can be given as, and no batch of numbers."""
    if isinstance(given, (str, Path)):
        return True
    return isinstance(given, Tensor) or hasattr(given, "__array__")


def join_places(places: Sequence[Any]) -> tuple[Tensor, tuple[int, ...]]:
    """Return the rows of several places side by side, in memory, and the places' widths.

    Errors: ValueError where they have not the same number of rows.
    """
    matrices = [
        read_rows(Path(given)) if isinstance(given, (str, Path)) else torch.as_tensor(given)
        for given in places
    ]
    for number, matrix in enumerate(matrices):
        require_matrix(matrix, f"activations[{number}]")
    if len({len(matrix) for matrix in matrices}) > 1:
        raise ValueError(
            "`activations` must have as many rows at every place, row i being of one token; got "
            f"{[len(matrix) for matrix in matrices]}. Collect them from the same tokens."
        )
    rows = [matrix[:] for matrix in matrices]
    return torch.cat(rows, 1), tuple(matrix.shape[1] for matrix in matrices)


def require_matrix(rows: Tensor | HarvestedRows, name: str) -> None:
    """Refuse what is not a non-empty floating (n, d_in) matrix."""
    if rows.ndim != 2 or 0 in rows.shape or not rows.is_floating_point():
        raise ValueError(
            f"`{name}` must be a floating-point matrix of shape (n, d_in), n and d_in at least 1; "
            f"got shape {tuple(rows.shape)}, {rows.dtype}. Reshape it so that each row is one "
            "activation."
        )


def read_rows(path: Path) -> Tensor | HarvestedRows:
    """Read (n, d_in) rows from a .npy or .safetensors file, or a folder of them, in name order.

    A .npy file is memory-mapped, and so is a folder that `sae harvest` wrote. Pickled arrays are
    refused.
    """
    if is_harvest(path):
        return HarvestedRows(path)
    return read_files(path)


def read_files(path: Path) -> Tensor:
    """Read rows as `read_rows` does, of anything but a harvest."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in READERS)
        if not files:
            raise ValueError(f"`{path}` must hold {' or '.join(READERS)} files; it holds none.")
        return torch.cat([read_files(file) for file in files])
    if not path.exists():
        raise ValueError(f"`activations` must be a path that exists; {path} is not there.")
    if path.suffix not in READERS:
        raise ValueError(f"`activations` must be one of {list(READERS)}; got {path.name}.")
    try:
        return READERS[path.suffix](path)
    except ValueError as error:
        raise ValueError(f"`{path}` must be a readable {path.suffix} file; {error}") from error
    except Exception as error:
        raise ValueError(
            f"`{path}` must be a whole {path.suffix} file; {error}. It is damaged."
        ) from error


def _read_npy(path: Path) -> Tensor:
    # Copy-on-write: torch wants writable memory, and nothing here writes.
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def _read_safetensors(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        name = "activations" if "activations" in names else names[0]
        if len(names) > 1 and name != "activations":
            raise ValueError(f"it holds {names[:5]}; name one `activations`.")
        return file.get_tensor(name)


READERS = {".npy": _read_npy, ".safetensors": _read_safetensors}
