"""Activations from the shards that `sae harvest` wrote, for any number of epochs.

The order is a pure function of (seed, epoch): shards in a permutation, each read from its beginning
to its end, piece by piece. A lane owns every n-th piece, in every epoch the same ones, so that what
it keeps in memory serves it again. Mixing rows is the shuffle buffer's work.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.config import Config
from sae.stream.hookpoints import choose_names
from sae.stream.manifest import Manifest, differences, plain_settings, read_complete
from sae.stream.prefetch import Prefetched
from sae.stream.reader import OTHER
from sae.stream.rows import Block
from sae.stream.shard_files import ShardFile

PIECES_AHEAD = 8
SAMPLE_ROWS = 16_384
SAMPLE_PIECES = 32
# What a training run must share with the harvest, as data that it holds out must not be in there.
SHARED_PREFIXES = ("model.name", "model.revision", "data.")


def open_shards(cfg: Config, seed: int, lane: int = 0, n_lanes: int = 1) -> ShardRows:
    """Open the folder `cfg.stream.shards` as one lane of a stream.

    Errors: ValueError where it is no complete harvest of the model, hookpoints and data of `cfg`.
    """
    folder = Path(cfg.stream.shards or "")
    manifest = read_complete(folder)
    require_match(folder, manifest, cfg)
    return ShardRows(
        folder,
        places(cfg, manifest.names),
        seed=seed,
        lane=lane,
        n_lanes=n_lanes,
        resident_tokens=cfg.stream.resident_tokens // n_lanes,
    )


def places(cfg: Config, names: Sequence[str]) -> tuple[str, ...]:
    """Return which of the hookpoints that were harvested `cfg` asks for: those that are written
    last."""
    read = choose_names(cfg.model.hookpoint, names)
    if cfg.model.other is not None:
        theirs = [OTHER + name for name in read]
        return (*read, *(name for name in names if name in theirs))
    return read if cfg.model.target is None else (*read, *choose_names(cfg.model.target, names))


def require_match(folder: Path, manifest: Manifest, cfg: Config) -> None:
    """Refuse shards of another model or other data than `cfg` names."""
    if changed := differences(manifest.identity, plain_settings(cfg, SHARED_PREFIXES)):
        raise ValueError(
            f"`stream.shards` must hold activations of the same model and data; in {folder} "
            f"{changed}. Give the settings of the harvest, or harvest with these into another "
            "folder."
        )


class ShardRows:
    """The rows of a harvest, piece by piece; a `RowStream`.

    Args:
        hookpoints: the names of those to hand out; None: all.
        seed: fixes the order of shards in every epoch.
        lane, n_lanes: which pieces are read: all those whose number modulo n_lanes is lane.
        resident_tokens: rows that stay in memory once read; the rest is read anew each epoch.

    Errors: ValueError where the folder is no complete harvest, lacks a hookpoint, or has fewer
    pieces than lanes; DamagedShardError, at any block, where a shard is not what was written.
    """

    def __init__(
        self,
        folder: Path | str,
        hookpoints: Sequence[str] | None = None,
        *,
        seed: int = 0,
        lane: int = 0,
        n_lanes: int = 1,
        resident_tokens: int = 0,
    ) -> None:
        self.folder, self.manifest = Path(folder), read_complete(Path(folder))
        self.names = _known_names(self.folder, self.manifest, hookpoints)
        places = [self.manifest.names.index(name) for name in self.names]
        self.widths = tuple(self.manifest.widths[place] for place in places)
        self.dtypes = (self.manifest.dtype,) * len(self.names)
        self.seed, self.lane, self.n_lanes = seed, lane, n_lanes
        self.resident_tokens = resident_tokens
        self._order = _Order(self.manifest, seed, lane, n_lanes)
        self._place = _Place()
        self._reader = self._new_reader(resident_tokens)
        self._blocks: Prefetched[_Step, Block] | None = None

    @property
    def epoch(self) -> int:
        """Whole passes over the shards before the last block."""
        return self._place.epoch

    def next_block(self) -> Block:
        """Return the rows of the next piece, in CPU memory."""
        if self._blocks is None:
            steps = _steps(self._order, self._place)
            self._blocks = Prefetched(self._reader.of_step, steps, ahead=PIECES_AHEAD)
        step, block = next(self._blocks)
        self._place = step.place
        return block

    def sample(self) -> Block:
        """Return up to 16,384 rows spread over all shards, the same for every lane and seed."""
        pieces = [(s, p) for s, e in enumerate(self.manifest.shards) for p in range(e.pieces)]
        n_chosen = min(len(pieces), SAMPLE_PIECES)
        chosen = [pieces[i * len(pieces) // n_chosen] for i in range(n_chosen)]
        reader, wanted = self._new_reader(0), -(-SAMPLE_ROWS // n_chosen)
        blocks = [_spread(reader.block(shard, piece), wanted) for shard, piece in chosen]
        rows = tuple(torch.cat(parts) for parts in zip(*(b.rows for b in blocks), strict=True))
        return Block(rows, torch.cat([block.documents for block in blocks]))

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last block."""
        return {"epoch": self._place.epoch, "position": self._place.position} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind a saved place.

        Errors: ValueError where it belongs to other shards, or to another seed or lane.
        """
        if changed := differences(state, self._identity()):
            raise ValueError(
                f"a stream of shards continues only where it stood; {changed}. Restore what the "
                "run began with, or start a new run."
            )
        if self._blocks is not None:
            self._blocks.close()
        self._place, self._blocks = _Place(state["epoch"], state["position"]), None

    def metadata(self) -> dict[str, object]:
        """Return what SAELens calls the origin of a dictionary."""
        return {
            "model_name": self.manifest.identity["model.name"],
            "hook_name": self.names[0],
            "context_size": self.manifest.identity["data.context_size"],
        }

    def token_counts(self) -> dict[str, float]:
        """Return nothing: what was left out was left out by the harvest."""
        return {}

    def weights(self) -> tuple[Tensor, ...]:
        """Return nothing: no model is loaded."""
        return ()

    def _identity(self) -> dict[str, Any]:
        return {
            "shards": self.manifest.digest(),
            "hookpoints": list(self.names),
            "seed": self.seed,
            "lane": self.lane,
            "n_lanes": self.n_lanes,
        }

    def _new_reader(self, resident_tokens: int) -> _Reader:
        return _Reader(self.folder, self.manifest, self.names, resident_tokens)


@dataclass(frozen=True)
class _Place:
    """`position` pieces of a lane's epoch are done."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class _Step:
    """A piece to read, and the place behind it."""

    place: _Place
    shard: int
    piece: int


class _Order:
    """Which pieces a lane reads in an epoch, as (shard, piece)."""

    def __init__(self, manifest: Manifest, seed: int, lane: int, n_lanes: int) -> None:
        counts = torch.tensor([shard.pieces for shard in manifest.shards])
        if not 0 <= lane < n_lanes <= int(counts.sum()):
            raise ValueError(
                f"`stream.shards` must hold a piece for each of {n_lanes} lanes; it holds "
                f"{int(counts.sum())} (lane {lane} was asked for). Launch fewer processes, or "
                "harvest more tokens."
            )
        self.counts, self.starts = counts.tolist(), (counts.cumsum(0) - counts).tolist()
        self.seed, self.lane, self.n_lanes = seed, lane, n_lanes
        self.n_pieces = len(range(lane, int(counts.sum()), n_lanes))

    def of(self, epoch: int) -> list[tuple[int, int]]:
        order = torch.randperm(len(self.counts), generator=_generator(self.seed, epoch)).tolist()
        return [
            (shard, piece)
            for shard in order
            for piece in range(
                (self.lane - self.starts[shard]) % self.n_lanes, self.counts[shard], self.n_lanes
            )
        ]


class _Reader:
    """Reads pieces as blocks, keeps some, and checks each the first time; for several threads."""

    def __init__(
        self, folder: Path, manifest: Manifest, names: Sequence[str], resident_tokens: int
    ) -> None:
        self.folder, self.manifest, self.names = folder, manifest, names
        self.room = resident_tokens
        self._kept: dict[tuple[int, int], Block] = {}
        self._checked: set[tuple[int, int]] = set()
        self._open: tuple[int, ShardFile] | None = None
        self._lock = threading.Lock()

    def of_step(self, step: _Step) -> Block:
        """Return the rows of a step's piece."""
        return self.block(step.shard, step.piece)

    def block(self, shard: int, piece: int) -> Block:
        """Return a piece's rows."""
        if (shard, piece) in self._kept:
            return self._kept[shard, piece]
        block = self._read(shard, piece)
        with self._lock:
            self._checked.add((shard, piece))
            if len(block.documents) <= self.room:
                self._kept[shard, piece] = block
                self.room -= len(block.documents)
        return block

    def _file(self, shard: int) -> ShardFile:
        with self._lock:
            if self._open is None or self._open[0] != shard:
                self._open = shard, ShardFile(self.folder, self.manifest.shards[shard])
            return self._open[1]

    def _read(self, shard: int, piece: int) -> Block:
        file, check = self._file(shard), (shard, piece) not in self._checked
        rows = tuple(file.rows(piece, name, check=check) for name in self.names)
        return Block(rows, file.documents(piece))


def _steps(order: _Order, place: _Place) -> Iterator[_Step]:
    """Yield all pieces behind `place`."""
    epoch, position = place.epoch, place.position
    while True:
        for done, (shard, piece) in islice(enumerate(order.of(epoch)), position, None):
            yield _Step(_Place(epoch, done + 1), shard, piece)
        epoch, position = epoch + 1, 0


def _spread(block: Block, wanted: int) -> Block:
    """Return at most `wanted` rows of a block, evenly spaced."""
    n = len(block.documents)
    chosen = torch.arange(min(n, wanted)) * n // max(1, min(n, wanted))
    return Block(tuple(rows[chosen] for rows in block.rows), block.documents[chosen])


def _known_names(
    folder: Path, manifest: Manifest, hookpoints: Sequence[str] | None
) -> tuple[str, ...]:
    for name in hookpoints or ():
        if name not in manifest.names:
            raise ValueError(
                f"`hookpoints` must be among those of {folder}, {', '.join(manifest.names)}; got "
                f"{name!r}."
            )
    return tuple(hookpoints) if hookpoints else manifest.names


def _generator(seed: int, epoch: int) -> torch.Generator:
    digest = hashlib.blake2b(f"shard order/{seed}/{epoch}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
