"""How much disk a harvest takes, told and checked before the model runs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae.config import Config
from sae.stream.content import Content, content_bytes
from sae.stream.documents import Documents, LocalDocuments, is_held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_BYTES = 13  # of a token besides its activations: id, document, mask
DISK_MARGIN = 1.05
SHARD_BYTES = 2**28
SAMPLE_DOCUMENTS = 512
SAMPLE_CHARACTERS = 8192


@dataclass(frozen=True)
class Size:
    """The disk that a harvest takes: bytes of one kept token, and about how many tokens."""

    token_bytes: int
    tokens: int

    @property
    def bytes(self) -> int:
        return self.token_bytes * self.tokens

    def __str__(self) -> str:
        per_million = readable(1e6 * self.token_bytes)
        return (
            f"{self.token_bytes:,} bytes a token, {per_million} per million tokens; about "
            f"{self.tokens:,} tokens, {readable(self.bytes)} in all"
        )


def token_bytes(widths: Sequence[int], dtype: torch.dtype) -> int:
    """Return the bytes of one kept token on disk."""
    return sum(widths) * dtype.itemsize + CONTEXT_BYTES


def shard_tokens(cfg: Config, token_bytes: int) -> int:
    """Return the kept tokens of a shard that `cfg` means."""
    return cfg.harvest.shard_tokens or max(1, SHARD_BYTES // token_bytes)


def estimate_tokens(documents: Documents, tokenizer: PreTrainedTokenizerBase, cfg: Config) -> int:
    """Return about how many tokens a harvest has: as asked for, or fewer where the text is short.

    Local text is counted on evenly spaced documents, of streamed text nothing is known.

    Errors: ValueError where text is streamed and no number is asked for.
    """
    wanted = cfg.harvest.tokens
    if not isinstance(documents, LocalDocuments):
        return require_tokens(wanted, cfg)
    fraction = cfg.data.held_out_fraction
    sampled = [c for c in sample_documents(documents) if not is_held_out(c, fraction)] or [" "]
    ids: Any = [content[:SAMPLE_CHARACTERS] for content in sampled]
    n_read = sum(map(len, ids))
    if cfg.data.content != "tokens":
        ids = tokenizer(ids, add_special_tokens=False, verbose=False)["input_ids"]
    share = len(documents) / min(len(documents), SAMPLE_DOCUMENTS)
    there_are = max(1, round(sum(map(len, sampled)) * sum(map(len, ids)) / n_read * share))
    return min(there_are, wanted or there_are)


def require_tokens(tokens: int | None, cfg: Config) -> int:
    """Refuse to harvest all of a text whose end is not known."""
    if tokens is None:
        raise ValueError(
            f"`harvest.tokens` must say how much of {cfg.data.source!r} to harvest, which is "
            "streamed and may not end; it is empty. Set it."
        )
    return tokens


def sample_documents(documents: LocalDocuments) -> list[Content]:
    """Return what at most 512 documents hold, evenly spaced."""
    n = min(len(documents), SAMPLE_DOCUMENTS)
    return [documents[i * len(documents) // n] for i in range(n)]


def text_digest(documents: Documents) -> str | None:
    """Return what tells one local text from another; None where text is streamed."""
    if not isinstance(documents, LocalDocuments):
        return None
    digest = hashlib.blake2b(str(len(documents)).encode(), digest_size=8)
    for content in sample_documents(documents):
        data = content_bytes(content)
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def require_room(folder: Path, n_bytes: int) -> str:
    """Refuse a disk without room for `n_bytes` more and 5%; say what is free.

    Errors: RuntimeError.
    """
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free, needed = shutil.disk_usage(parent).free, round(n_bytes * DISK_MARGIN)
    if free < needed:
        raise RuntimeError(
            f"`harvest.folder` must lie on a disk with {readable(needed)} free; {parent} has "
            f"{readable(free)}. Lower `harvest.tokens`, name fewer hookpoints, set "
            "`stream.dtype` to a narrower one, or choose another folder."
        )
    return f"{readable(free)} are free"


def readable(n_bytes: float) -> str:
    """Return bytes as a person says them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 1e3:.1f} kB"
