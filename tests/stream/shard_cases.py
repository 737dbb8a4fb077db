"""Harvests written without a model: rows that tell which token they are."""

from __future__ import annotations

from pathlib import Path

import torch

from sae.stream import shard_files
from sae.stream.contexts import Contexts
from sae.stream.manifest import Manifest
from sae.stream.moments import Moments
from sae.stream.shard_files import split_pieces
from sae.stream.shard_writer import Draft, ShardWriter

NAMES = ("model.layers.0", "model.layers.1:in")
WIDTHS = (3, 5)
T = 6


def identity(**changed: object) -> dict:
    return {
        "model.name": "tiny",
        "data.context_size": T,
        "hookpoints": list(NAMES),
        "widths": list(WIDTHS),
        "dtype": "float32",
        **changed,
    }


def batch(start: int, b: int, dtype: torch.dtype) -> tuple[Contexts, tuple[torch.Tensor, ...]]:
    """Return b contexts, their first token masked, and rows that hold their tokens' numbers."""
    tokens = torch.arange(start, start + b * T).reshape(b, T)
    is_kept = torch.ones(b, T, dtype=torch.bool)
    is_kept[:, 0] = False
    if b > 2:
        is_kept[1] = False  # a context of which nothing is kept
    documents = tokens // 9
    ids = tokens[is_kept].to(dtype)
    rows = tuple(ids[:, None] + 1000.0 * torch.arange(d).to(dtype) for d in WIDTHS)
    return Contexts(tokens, documents, is_kept), tuple(r.to(dtype) for r in rows)


def write_harvest(
    folder: Path,
    *,
    shards: int = 4,
    batches: int = 3,
    b: int = 4,
    piece_rows: int = 6,
    dtype: torch.dtype = torch.float32,
) -> Manifest:
    """Write a complete harvest whose rows' first entries are 0, 1, 2, … but for masked tokens."""
    row_bytes = sum(WIDTHS) * dtype.itemsize
    before = shard_files.PIECE_BYTES
    shard_files.PIECE_BYTES = piece_rows * row_bytes
    try:
        manifest = Manifest(identity(dtype=str(dtype).removeprefix("torch.")))
        manifest.write(folder)
        start = 0
        with ShardWriter(folder, manifest) as writer:
            for index in range(shards):
                draft = Draft()
                for _ in range(batches):
                    contexts, rows = batch(start, b, dtype)
                    start += b * T
                    draft.add(split_pieces(contexts, rows), [Moments.of(r) for r in rows])
                    draft.batches += 1
                writer.put(index, draft)
            return writer.finish("text")
    finally:
        shard_files.PIECE_BYTES = before


def all_ids(shards: int = 4, batches: int = 3, b: int = 4) -> list[int]:
    """Return the first entries of all rows that `write_harvest` wrote, in order."""
    ids = []
    for start in range(0, shards * batches * b * T, b * T):
        contexts, _ = batch(start, b, torch.float32)
        ids += contexts.tokens[contexts.is_kept].tolist()
    return ids
