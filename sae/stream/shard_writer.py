"""Fills a folder with shards, one after another, in a thread of its own.

The manifest is written after each shard, so that a kill loses at most the shards that were under
way. What it left behind (a file half written, a shard not yet listed) is removed when the folder is
opened again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from sae.files import partial_path
from sae.stream.manifest import MANIFEST, End, Manifest
from sae.stream.moments import Moments, merged
from sae.stream.shard_files import (
    PARTIAL,
    DamagedShardError,
    Piece,
    ShardFile,
    moment_parts,
    write_content,
    write_shard,
)

_SHARD = re.compile(r"[0-9a-f]{16}\.safetensors")


@dataclass
class Draft:
    """A shard in memory: its pieces, the moments of their rows, the forward passes behind it.

    end: what ended the whole harvest with this shard, if anything did.
    """

    pieces: list[Piece] = field(default_factory=list)
    moments: tuple[Moments, ...] = ()
    rows: int = 0
    batches: int = 0
    end: End | None = None

    def add(self, pieces: Sequence[Piece], moments: Sequence[Moments]) -> None:
        """Append the pieces of one forward pass, and the moments of their rows."""
        self.pieces += pieces
        self.rows += sum(len(piece.rows[0]) for piece in pieces)
        pairs = zip(self.moments or moments, moments, strict=True)
        self.moments = tuple(a.merge(b) if self.moments else b for a, b in pairs)


def open_folder(folder: Path) -> Manifest | None:
    """Return the manifest that `folder` holds; None where it is new or empty.

    Errors: ValueError where it holds anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`harvest.folder` must be a folder; {folder} is a file. Choose another.")
    if (folder / MANIFEST).exists():
        return Manifest.read(folder)
    if folder.exists() and {path.name for path in folder.iterdir()} - _partials(folder):
        raise ValueError(
            f"`harvest.folder` must be new, empty or a harvest; {folder} holds other files. "
            "Choose another folder."
        )
    return None


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove what a kill left in the folder: partial files, and shards that nothing lists."""
    for path in folder.iterdir():
        is_unlisted = _SHARD.fullmatch(path.name) and path.name not in manifest.files
        if is_unlisted or path.name in _partials(folder):
            path.unlink()


class ShardWriter:
    """Writes drafts into a folder, in their order, while the next is being made.

    Use it as a context manager: leaving it waits for what is under way. An error of the thread is
    raised by the next call, or by leaving.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sae-shards")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def put(self, index: int, draft: Draft) -> None:
        """Write the shard number `index`: the next one, or anew one that the manifest lists."""
        self.wait()
        self._under_way = self._thread.submit(self._write, index, draft)

    def wait(self) -> None:
        """Wait for the shard under way."""
        if self._under_way is not None:
            done, self._under_way = self._under_way, None
            done.result()

    def finish(self, end: End) -> Manifest:
        """Write the statistics of all rows, and a manifest that says that all is there."""
        self.wait()
        names = self.manifest.names
        files = [ShardFile(self.folder, entry) for entry in self.manifest.shards]
        widths = zip(names, self.manifest.widths, strict=True)
        moments = [merged((file.moments(name) for file in files), d) for name, d in widths]
        name, _ = write_content(self.folder, moment_parts(names, moments))
        summary = {
            name: {"mean_norm": float(m.mean_norm), "total_variance": float(m.variance.sum())}
            for name, m in zip(names, moments, strict=True)
        }
        statistics = {"file": f"{name}.safetensors", "hookpoints": summary}
        self.manifest = replace(self.manifest, end=end, statistics=statistics)
        self.manifest.write(self.folder)
        return self.manifest

    def _write(self, index: int, draft: Draft) -> None:
        names = self.manifest.names
        entry = write_shard(self.folder, names, draft.pieces, draft.moments, draft.batches)
        if index == len(self.manifest.shards):
            self.manifest = self.manifest.with_shard(entry, draft.end)
            self.manifest.write(self.folder)
        elif entry != self.manifest.shards[index]:
            (self.folder / entry.file).unlink()
            raise RuntimeError(
                f"{self.folder / self.manifest.shards[index].file} must come out as it was to be "
                "made again; other activations came out. The text or the model behind its name "
                "changed, or another processor computes them. Harvest into another folder."
            )


def has_statistics(folder: Path, manifest: Manifest) -> bool:
    """Say whether the file of statistics that the manifest names is what was written."""
    if manifest.statistics is None:
        return False
    path = folder / manifest.statistics["file"]
    # A file without activations is digested whole.
    return path.is_file() and hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() == (
        path.stem
    )


def read_moments(folder: Path, manifest: Manifest) -> dict[str, Moments]:
    """Return the moments of all rows of a complete harvest, by hookpoint.

    Errors: DamagedShardError where their file is missing or damaged.
    """
    from safetensors.torch import load_file

    assert manifest.statistics is not None
    path = folder / manifest.statistics["file"]
    if not has_statistics(folder, manifest):
        raise DamagedShardError(path, "it is missing or differs")
    tensors = load_file(path)
    return {
        name: Moments(
            manifest.rows,
            tensors[f"mean.{name}"],
            tensors[f"m2.{name}"],
            tensors[f"mean_norm.{name}"],
        )
        for name in manifest.names
    }


def _partials(folder: Path) -> set[str]:
    return {PARTIAL, partial_path(folder / MANIFEST).name}
