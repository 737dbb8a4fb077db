"""One shard on disk: a safetensors file named by its content, read piece by piece.

A shard holds contexts whole, in the order in which the model read them:

    pieces                (p, 2 + hookpoints) int64: contexts, rows, and a checksum a hookpoint
    mean.H  m2.H  mean_norm.H     float64: the moments of the rows at hookpoint H
    document_ids (c, t) int64   tokens (c, t) int32   is_kept (c, t) bool
    activations.H         (n, d) in the stream's dtype: row i is the i-th kept token

A piece is a run of contexts with about 2 MiB of rows: what is read at once. The file's name is the
blake2b of its header and of all but the activations, for which the checksums in `pieces` stand;
these are as quick as reading memory, where a hash of every byte would be what a harvest waits for.
Damage is never trained on: opening a shard checks its name, reading a piece first its checksum.

Reading is `readinto` new memory and not a memory map, under which a file that is cut or a failing
disk would kill the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.files import explained_write
from sae.stream.contexts import Contexts
from sae.stream.manifest import ShardEntry
from sae.stream.moments import Moments

PIECE_BYTES = 2**21  # more comes in new pages from the system, which cost as much as the reading
PARTIAL = ".shard.partial"
_ROWS = "activations."
_BYTES_AT_ONCE = 2**24
_WORDS_IN_BLOCK = 4096
_CODES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
Parts = Mapping[str, Sequence[Tensor]]
"""Tensors by name, each given as parts that follow each other along the first axis."""


@dataclass(frozen=True)
class Piece:
    """Some contexts and the rows of their kept tokens, one (n, d) a hookpoint, in CPU memory."""

    contexts: Contexts
    rows: tuple[Tensor, ...]


class DamagedShardError(ValueError):
    """A shard is missing, cut, or not what was written."""

    def __init__(self, path: Path, what: str):
        super().__init__(
            f"`{path}` must be the shard that `sae harvest` wrote; {what}. Run the same "
            "`sae harvest` command again: it makes this shard anew and keeps the others."
        )


def split_pieces(contexts: Contexts, rows: tuple[Tensor, ...]) -> list[Piece]:
    """Cut the contexts of a forward pass, and their kept rows, into pieces; none has no rows."""
    counts = contexts.is_kept.sum(1)
    if not counts.any():
        return []
    starts = counts.cumsum(0) - counts
    # Contexts without rows stay with the rows that follow them, or, at the end, with the last.
    starts = starts.clamp(max=int(starts[counts > 0].max()))
    wanted = max(1, PIECE_BYTES // sum(r.shape[1] * r.itemsize for r in rows))
    sizes = (starts // wanted).unique_consecutive(return_counts=True)[1].tolist()
    n_rows = [int(part.sum()) for part in counts.split(sizes)]
    fields = (contexts.tokens, contexts.document_ids, contexts.is_kept)
    cut_contexts = zip(*(field.split(sizes) for field in fields), strict=True)
    cut_rows = zip(*(r.split(n_rows) for r in rows), strict=True)
    return [Piece(Contexts(*c), r) for c, r in zip(cut_contexts, cut_rows, strict=True)]


def write_shard(
    folder: Path,
    names: Sequence[str],
    pieces: Sequence[Piece],
    moments: Sequence[Moments],
    batches: int,
) -> ShardEntry:
    """Write a shard into `folder` under the name of its content, atomically.

    Args:
        pieces: at least one. moments: of all their rows, one a hookpoint.
        batches: forward passes that the shard stands for.

    Errors: RuntimeError where the disk is full or cannot be written.
    """
    parts = _head_parts(names, pieces, moments)
    rows = {f"{_ROWS}{n}": [p.rows[i] for p in pieces] for i, n in enumerate(names)}
    name, n_bytes = write_content(folder, {**parts, **rows})
    return ShardEntry(
        name=name,
        batches=batches,
        contexts=sum(len(p.contexts.tokens) for p in pieces),
        rows=sum(len(p.rows[0]) for p in pieces),
        pieces=len(pieces),
        bytes=n_bytes,
    )


def write_content(folder: Path, parts: Parts) -> tuple[str, int]:
    """Write a safetensors file named by its content, atomically; return its name and bytes."""
    # Wide elements first, as the format's own writer does: every tensor is then aligned.
    order = sorted(parts, key=lambda name: -parts[name][0].itemsize)
    header = _header({name: parts[name] for name in order})
    head = {name: parts[name] for name in order if not name.startswith(_ROWS)}
    name = _digest(header, head)
    buffers = [memoryview(header), *(_bytes(t) for name in order for t in parts[name])]
    with explained_write(folder):
        try:
            _write_all(folder / PARTIAL, buffers)
            # The folder itself is not flushed: a name that a power cut loses is one shard to make
            # again, and waiting for it costs as much as tens of megabytes.
            (folder / PARTIAL).replace(folder / f"{name}.safetensors")
        finally:
            (folder / PARTIAL).unlink(missing_ok=True)
    return name, sum(len(buffer) for buffer in buffers)


def is_intact(folder: Path, entry: ShardEntry) -> bool:
    """Read a whole shard and say whether it is what was written."""
    try:
        file = ShardFile(folder, entry)
        for piece in range(entry.pieces):
            for name in file.names:
                file.rows(piece, name)
    except DamagedShardError:
        return False
    return True


class ShardFile:
    """A shard opened for reading: its head is in memory and checked, its rows are on disk.

    Errors: DamagedShardError.
    """

    def __init__(self, folder: Path, entry: ShardEntry):
        self.path, self.entry = folder / entry.file, entry
        self._require_size()
        self._places, self._head = self._read_head()
        self.names = tuple(
            name.removeprefix(_ROWS) for name in self._places if name.startswith(_ROWS)
        )
        ends = self._head["pieces"][:, :2].cumsum(0)
        self._context_ends, self._row_ends = ([0, *column] for column in ends.T.tolist())

    def contexts(self, piece: int) -> Contexts:
        """Return the contexts of one piece, as the stream of contexts gave them."""
        span = slice(self._context_ends[piece], self._context_ends[piece + 1])
        head = self._head
        return Contexts(
            head["tokens"][span].long(), head["document_ids"][span], head["is_kept"][span]
        )

    def documents(self, piece: int) -> Tensor:
        """Return the document of each row of a piece, (n,) int64."""
        span = slice(self._context_ends[piece], self._context_ends[piece + 1])
        return self._head["document_ids"][span][self._head["is_kept"][span]]

    def rows(self, piece: int, name: str, *, check: bool = True) -> Tensor:
        """Read one piece's rows at a hookpoint, (n, d), into new memory."""
        start, end = self._row_ends[piece], self._row_ends[piece + 1]
        rows = self._read(self._places[f"{_ROWS}{name}"], start, end)
        expected = int(self._head["pieces"][piece, 2 + self.names.index(name)])
        if check and checksum(rows) != expected:
            raise DamagedShardError(self.path, f"its rows {start} to {end} of `{name}` differ")
        return rows

    def moments(self, name: str) -> Moments:
        """Return the moments of the shard's rows at a hookpoint."""
        mean, m2, mean_norm = (self._head[f"{part}.{name}"] for part in ("mean", "m2", "mean_norm"))
        return Moments(self.entry.rows, mean, m2, mean_norm)

    def place(self, name: str) -> _Place:
        """Return where a hookpoint's rows lie in the file."""
        return self._places[f"{_ROWS}{name}"]

    def _require_size(self) -> None:
        if not self.path.is_file():
            raise DamagedShardError(self.path, "it is missing")
        n_bytes = self.path.stat().st_size
        if n_bytes != self.entry.bytes:
            raise DamagedShardError(self.path, f"it has {n_bytes} of {self.entry.bytes} bytes")

    def _read_head(self) -> tuple[dict[str, _Place], dict[str, Tensor]]:
        """Return where each tensor lies, and all but the activations."""
        with self.path.open("rb", buffering=0) as file:
            size = file.read(8)
            header = size + file.read(min(int.from_bytes(size, "little"), self.entry.bytes))
        try:
            places = _places(header, self.entry.bytes)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DamagedShardError(self.path, f"its header is damaged ({error})") from error
        head = {
            name: self._read(place, 0, place.shape[0])
            for name, place in places.items()
            if not name.startswith(_ROWS)
        }
        if _digest(header, {name: [tensor] for name, tensor in head.items()}) != self.entry.name:
            raise DamagedShardError(self.path, "its header, tokens or masks differ")
        return places, head

    def _read(self, place: _Place, start: int, end: int) -> Tensor:
        """Read entries `start` to `end` of a tensor's first axis."""
        out = torch.empty(end - start, *place.shape[1:], dtype=place.dtype)
        buffer = _bytes(out)
        row_bytes = len(buffer) // max(1, end - start)
        with self.path.open("rb", buffering=0) as file:
            file.seek(place.offset + start * row_bytes)
            done = 0
            while done < len(buffer):
                n_read = file.readinto(buffer[done : done + _BYTES_AT_ONCE])
                if not n_read:
                    raise DamagedShardError(self.path, "it ends early")
                done += n_read
        return out


def checksum(rows: Tensor) -> int:
    """Return a checksum of a tensor's bytes, nearly as fast as memory is read; int64.

    The sum modulo 2⁶⁴ of all 64-bit words, each times a weight of its place in its block of 4096
    and one of its block. All weights are odd, so that a change within one word always shows;
    others, words that changed places among them, go unseen about once in 2⁶⁴.
    """
    data = np.frombuffer(_bytes(rows), dtype=np.uint8)
    n_whole = len(data) // (8 * _WORDS_IN_BLOCK)
    blocks = data[: n_whole * 8 * _WORDS_IN_BLOCK].view(np.int64).reshape(n_whole, _WORDS_IN_BLOCK)
    rest = data[n_whole * 8 * _WORDS_IN_BLOCK :]
    padded = np.zeros((1, _WORDS_IN_BLOCK * 8), dtype=np.uint8)
    padded[0, : len(rest)] = rest
    within = _weights(_WORDS_IN_BLOCK, 0)
    sums = [np.einsum("ij,j->i", part, within) for part in (blocks, padded.view(np.int64))]
    return int((np.concatenate(sums) * _weights(n_whole + 1, _WORDS_IN_BLOCK)).sum())


@lru_cache(maxsize=64)
def _weights(n: int, start: int) -> np.ndarray:
    """Return n odd int64 numbers that look random: multiples of 2⁶⁴ over the golden ratio."""
    places = np.arange(start + 1, start + n + 1, dtype=np.uint64)
    return (places * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)).view(np.int64)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a safetensors file; `offset` in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def _head_parts(
    names: Sequence[str], pieces: Sequence[Piece], moments: Sequence[Moments]
) -> dict[str, list[Tensor]]:
    """Return all that a shard holds besides the activations."""
    table = [
        [len(p.contexts.tokens), len(p.rows[0]), *(checksum(rows) for rows in p.rows)]
        for p in pieces
    ]
    parts: dict[str, list[Tensor]] = {
        "pieces": [torch.tensor(table)],
        "document_ids": [p.contexts.document_ids for p in pieces],
        "tokens": [p.contexts.tokens.int() for p in pieces],
        "is_kept": [p.contexts.is_kept for p in pieces],
    }
    return parts | moment_parts(names, moments)


def moment_parts(names: Sequence[str], moments: Sequence[Moments]) -> dict[str, list[Tensor]]:
    """Return the tensors of each hookpoint's moments, by their names in a file."""
    parts = {}
    for name, m in zip(names, moments, strict=True):
        parts |= {f"mean.{name}": [m.mean], f"m2.{name}": [m.m2]}
        parts[f"mean_norm.{name}"] = [m.mean_norm]
    return parts


def _digest(header: bytes, parts: Parts) -> str:
    """Digest the header and all parts, in the order of the file."""
    digest = hashlib.blake2b(header, digest_size=8)
    for tensors in parts.values():
        for tensor in tensors:
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _header(parts: Parts) -> bytes:
    """Return a safetensors header: its length, 8 bytes, and JSON padded to whole words."""
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensors in parts.items():
        end = offset + sum(t.nbytes for t in tensors)
        shape = [sum(len(t) for t in tensors), *tensors[0].shape[1:]]
        code = _CODES[tensors[0].dtype]
        tree[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _places(header: bytes, n_bytes: int) -> dict[str, _Place]:
    """Read the safetensors header of a file of `n_bytes`.

    Errors: ValueError, KeyError, TypeError, IndexError or AttributeError where it is damaged.
    """
    tree = json.loads(header[8:])
    places = {}
    for name, entry in tree.items():
        if name == "__metadata__":
            continue
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if math.prod(shape) * dtype.itemsize != end - start or len(header) + end > n_bytes:
            raise ValueError(f"{name} has impossible places")
        places[name] = _Place(dtype, shape, len(header) + start)
    return places


def _write_all(path: Path, buffers: Sequence[memoryview]) -> None:
    """Write a file and flush it to disk."""
    with path.open("wb", buffering=0) as file:
        for buffer in buffers:
            while len(buffer):
                buffer = buffer[os.write(file.fileno(), buffer[:_BYTES_AT_ONCE]) :]
        os.fsync(file.fileno())


def _bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's memory, without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
