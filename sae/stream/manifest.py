"""The list of what a harvest's folder holds: whose activations, which shards, whether all.

`manifest.json` is written anew, whole, after every shard. It holds no time and no path, so that a
harvest that was killed and continued ends in the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sae.config import Config
from sae.configuration import flatten
from sae.files import read_json, write_json

MANIFEST = "manifest.json"
# All rows are on disk, whoever reads leaves some out; and any device may have made them.
READER_SETTINGS = ("data.max_norm_ratio", "model.device", "model.target")
FORMAT = 1
End = Literal["tokens", "text"]


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a folder.

    name: of its file, without the suffix: a digest of its content, 16 hex digits.
    batches, contexts, rows, pieces, bytes: how many it holds; batches are forward passes.
    """

    name: str
    batches: int
    contexts: int
    rows: int
    pieces: int
    bytes: int

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards is.

    identity: dotted settings and facts that decide the activations; plain JSON.
    end: what ended the harvest, `harvest.tokens` or the text; None: not all shards are there.
    statistics: the name of the file with the moments of all rows, and each hookpoint's mean norm
        and total variance; None until complete.
    """

    identity: dict[str, Any]
    shards: tuple[ShardEntry, ...] = ()
    end: End | None = None
    statistics: dict[str, Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The hookpoints."""
        return tuple(self.identity["hookpoints"])

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.identity["widths"])

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.identity["dtype"])

    @property
    def rows(self) -> int:
        """Kept tokens in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def files(self) -> set[str]:
        """The names of all files that the manifest vouches for."""
        listed = {shard.file for shard in self.shards}
        return listed | ({self.statistics["file"]} if self.statistics else set())

    def digest(self) -> str:
        """Return what tells these activations from others: 16 hex digits over the shards' names."""
        return digest_of([shard.name for shard in self.shards])

    @property
    def is_complete(self) -> bool:
        return self.statistics is not None

    def with_shard(self, entry: ShardEntry, end: End | None) -> Manifest:
        """Return the manifest with one more shard, which may be the last."""
        return replace(self, shards=(*self.shards, entry), end=end)

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, atomically."""
        tree = {
            "format": FORMAT,
            "identity": self.identity,
            "tokens": self.rows,
            "end": self.end,
            "statistics": self.statistics,
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_json(folder / MANIFEST, {**tree, "checksum": digest_of(tree)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of `folder`.

        Errors: ValueError where there is none, it is damaged, or of another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"`{folder}` must be a folder that `sae harvest` wrote; it has no {MANIFEST}. "
                "Give its path, or harvest into it."
            )
        tree = read_json(path)
        if tree.get("format") != FORMAT:
            raise ValueError(
                f"`{path}` must have the format {FORMAT}; it has {tree.get('format')!r}. Harvest "
                "into another folder, or read it with the version of sae that wrote it."
            )
        if tree.pop("checksum", None) != digest_of(tree):
            raise ValueError(
                f"`{path}` must be as `sae harvest` wrote it; its checksum is another, so it is "
                "damaged or was edited. Restore it, or harvest into another folder."
            )
        shards = tuple(ShardEntry(**shard) for shard in tree["shards"])
        return cls(tree["identity"], shards, tree["end"], tree["statistics"])


def is_harvest(folder: Path) -> bool:
    """Say whether `sae harvest` wrote `folder`."""
    return (folder / MANIFEST).is_file()


def read_complete(folder: Path) -> Manifest:
    """Read the manifest of a finished harvest.

    Errors: ValueError as `Manifest.read`, and where the harvest is not complete.
    """
    manifest = Manifest.read(folder)
    if not manifest.is_complete:
        raise ValueError(
            f"`{folder}` must hold a complete harvest to be read; it holds {manifest.rows:,} "
            "tokens of an unfinished one. Run the same `sae harvest` command again: it continues."
        )
    return manifest


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the fields of `now` that are another in `before`; empty where none is."""
    changed = [key for key in now if before.get(key) != now[key]]
    return "; ".join(f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in changed)


def plain_settings(cfg: Config, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of these prefixes that decide activations, as plain JSON."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in flatten(cfg).items()
        if key.startswith(prefixes) and key not in READER_SETTINGS
    }


def digest_of(value: object) -> str:
    """Return what tells one value of plain data from another: 16 hex digits."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
