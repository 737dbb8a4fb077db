"""How fast shards are written and read, beside plain sequential writing and reading of as much.

Contenders take turns within one run, so that a disturbance falls on all alike; rates are medians,
in bytes of activations a second. What is compared with is the same bytes through `write` and
`readinto` in pieces of 8 MiB: to the disk and flushed where shards are written, and from the page
cache or, `cold`, from the disk where they are read.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sae.stream.contexts import Contexts
from sae.stream.manifest import Manifest
from sae.stream.moments import Moments
from sae.stream.shard_files import Piece, split_pieces, write_shard
from sae.stream.shard_writer import Draft, ShardWriter
from sae.stream.shards import ShardRows

CONTEXT_SIZE = 256
CONTEXTS_IN_FORWARD = 16
NAME = "layer"
CHUNK_BYTES = 2**23


def write_rate(
    folder: Path,
    *,
    d: int = 576,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 2**28,
    repeats: int = 7,
) -> dict[str, Any]:
    """Write shards of random rows into `folder`, which is made and removed, and plain files."""
    draft = _draft(d, dtype, shard_bytes, seed=0)
    rows = [piece.rows[0] for piece in draft.pieces]
    n_bytes = sum(r.nbytes for r in rows)
    buffers = [r.view(-1).view(torch.uint8).numpy().data for r in rows]
    folder.mkdir(parents=True, exist_ok=False)

    def shard() -> None:
        entry = write_shard(folder, [NAME], draft.pieces, draft.moments, draft.batches)
        (folder / entry.file).unlink()

    def plain() -> None:
        _write_plainly(folder / "plain", buffers)
        (folder / "plain").unlink()

    try:
        times = _in_turn({"shard": shard, "plain": plain}, repeats)
    finally:
        shutil.rmtree(folder)
    return _rates(times, n_bytes) | {"bytes": n_bytes, "d": d, "dtype": str(dtype)}


def read_rate(
    folder: Path,
    *,
    d: int = 576,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 2**28,
    n_shards: int = 4,
    repeats: int = 5,
    cold: bool = False,
) -> dict[str, Any]:
    """Read an epoch of shards through `ShardRows`, and the same files plainly.

    `first` is a new stream's first epoch, in which every piece is checked, `later` its second.
    `cold` asks the system to forget the files before each of them. `folder` is made and removed.
    """
    manifest = _write_harvest(folder, d, dtype, shard_bytes, n_shards)
    files = [folder / entry.file for entry in manifest.shards]
    n_pieces = sum(entry.pieces for entry in manifest.shards)
    n_bytes = manifest.rows * d * dtype.itemsize
    forget = (lambda: _forget(files)) if cold else (lambda: None)
    times: dict[str, list[float]] = {"first": [], "later": [], "plain": []}
    try:
        for turn in range(repeats):
            rows = ShardRows(folder, seed=turn)
            for name in ("first", "later"):
                forget()
                times[name].append(_seconds(lambda rows=rows: _read_epoch(rows, n_pieces)))
            forget()
            times["plain"].append(_seconds(lambda: _read_plainly(files)))
    finally:
        shutil.rmtree(folder)
    return _rates(times, n_bytes) | {
        "bytes": n_bytes,
        "d": d,
        "dtype": str(dtype),
        "from": "disk" if cold else "page cache",
    }


def _draft(d: int, dtype: torch.dtype, n_bytes: int, seed: int) -> Draft:
    """Return a shard's worth of random rows, as forward passes would give them."""
    generator = torch.Generator().manual_seed(seed)
    is_kept = torch.ones(CONTEXTS_IN_FORWARD, CONTEXT_SIZE, dtype=torch.bool)
    is_kept[:, 0] = False
    pieces: list[Piece] = []
    rows_wanted = n_bytes // (d * dtype.itemsize)
    while sum(len(piece.rows[0]) for piece in pieces) < rows_wanted:
        tokens = torch.randint(50_000, is_kept.shape, generator=generator)
        rows = torch.randn(int(is_kept.sum()), d, generator=generator).to(dtype)
        pieces += split_pieces(Contexts(tokens, tokens // 100, is_kept), (rows,))
    draft = Draft(batches=len(pieces))
    draft.add(pieces, [Moments.none(d)])
    return draft


def _write_harvest(
    folder: Path, d: int, dtype: torch.dtype, shard_bytes: int, n_shards: int
) -> Manifest:
    identity = {
        "model.name": "random",
        "data.context_size": CONTEXT_SIZE,
        "hookpoints": [NAME],
        "widths": [d],
        "dtype": str(dtype).removeprefix("torch."),
    }
    manifest = Manifest(identity)
    manifest.write(folder)
    with ShardWriter(folder, manifest) as writer:
        for index in range(n_shards):
            writer.put(index, _draft(d, dtype, shard_bytes, seed=index))
        return writer.finish("tokens")


def _read_epoch(rows: ShardRows, n_pieces: int) -> None:
    for _ in range(n_pieces):
        rows.next_block()


def _read_plainly(files: Sequence[Path]) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _write_plainly(path: Path, buffers: Sequence[memoryview]) -> None:
    with path.open("wb", buffering=0) as file:
        for buffer in buffers:
            for start in range(0, len(buffer), CHUNK_BYTES):
                file.write(buffer[start : start + CHUNK_BYTES])
        os.fsync(file.fileno())


def _forget(files: Sequence[Path]) -> None:
    """Ask the system to drop files from its cache; they are on the disk already."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_turn(contenders: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, work in contenders.items():
            times[name].append(_seconds(work))
    return times


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _rates(times: dict[str, list[float]], n_bytes: int) -> dict[str, Any]:
    """Return median gigabytes a second, and each contender's share of the plain one's."""
    rates = {name: n_bytes / median(taken) / 1e9 for name, taken in times.items()}
    shares = {f"{name}_share": rates[name] / rates["plain"] for name in rates if name != "plain"}
    return {**{f"{name}_gb_per_s": rate for name, rate in rates.items()}, **shares}
