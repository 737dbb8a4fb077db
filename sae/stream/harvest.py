"""`sae harvest`: run the model once over the training text and write what it computes to disk.

Shards are runs of forward passes. Which contexts a shard holds follows from the configuration
alone, so a shard can be made again by itself: a harvest that was killed continues behind the last
shard that the manifest lists, one whose shard is damaged makes that one anew, and both end in the
folder of an uninterrupted harvest, byte for byte. Passes that are already on disk are tokenized
again, which costs little, and not run.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sae.config import Config
from sae.stream import shard_files
from sae.stream.contexts import Contexts
from sae.stream.documents import Documents, LocalDocuments
from sae.stream.harvest_size import (
    Size,
    estimate_tokens,
    readable,
    require_room,
    require_tokens,
    shard_tokens,
    text_digest,
    token_bytes,
)
from sae.stream.manifest import End, Manifest, differences, digest_of, plain_settings
from sae.stream.moments import Moments
from sae.stream.opening import OpenedModel, open_model, pick_device
from sae.stream.shard_files import is_intact, split_pieces
from sae.stream.shard_writer import (
    Draft,
    ShardWriter,
    has_statistics,
    open_folder,
    remove_leftovers,
)
from sae.stream.source import require_finite

PACKAGES = ("torch", "transformers")
Tell = Callable[[str, int, int | None], None]


def harvest(
    cfg: Config, *, say: Callable[[str], None] = print, tell: Tell = lambda *_: None
) -> Path:
    """Write the activations that `cfg` names into its folder of shards, and return the folder.

    A folder that holds part of the same harvest is continued; missing and damaged shards are made
    again.

    Args:
        say: is given lines for a person. tell: is given (stage, done, wanted) as work goes on.

    Errors: ValueError where the folder holds anything else or another harvest, naming what differs;
    RuntimeError where the disk has too little room, before the model runs, or is full in the end.
    """
    require_one_process()
    folder = Path(cfg.harvest.folder or f"shards/{Path(cfg.run.folder or 'run').name}")
    device = pick_device(cfg.run.device)
    opened = open_model(cfg, device, require=lambda documents: _require_an_end(documents, cfg))
    plan = _Plan(opened)
    size = Size(
        token_bytes(plan.widths, plan.dtype),
        estimate_tokens(opened.documents, opened.lm.tokenizer, cfg),
    )
    manifest = _manifest_of(folder, plan)
    damaged = _damaged(folder, manifest, tell)
    free = require_room(folder, _bytes_to_write(manifest, damaged, size))
    say(f"{', '.join(plan.names)} of {cfg.model.name}: {size}; {free} for {folder}.")
    _say_what_is_there(folder, manifest, damaged, say)
    manifest.write(folder)
    remove_leftovers(folder, manifest)
    with ShardWriter(folder, manifest) as writer:
        manifest = _Harvest(plan, writer, damaged, tell, size.tokens).run()
    say(_summary(cfg, folder, manifest))
    return folder


def require_one_process() -> None:
    """Refuse a launcher's several processes, which would write the same shards."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "`sae harvest` must run as one process; a launcher started "
            f"{os.environ['WORLD_SIZE']}. Start it without the launcher, or give each process "
            "its own text and folder."
        )


class _Plan:
    """What is harvested: where, from what, and in which portions."""

    def __init__(self, opened: OpenedModel) -> None:
        self.opened, self.reader = opened, opened.reader()
        stream = opened.cfg.stream
        self.widths, self.names = list(self.reader.widths), list(self.reader.names)
        self.dtype = opened.lm.dtype if stream.dtype == "auto" else getattr(torch, stream.dtype)
        self.shard_tokens = shard_tokens(opened.cfg, token_bytes(self.widths, self.dtype))
        self.tokens = opened.cfg.harvest.tokens

    def batches(self) -> Iterator[Contexts]:
        """Yield the contexts of each forward pass, once through the training text."""
        stream = self.opened.contexts("train")
        return iter(stream.batches(self.opened.cfg.stream.sequences_per_forward))

    def identity(self) -> dict[str, Any]:
        """Return all that decides the bytes of the shards, as plain JSON."""
        cfg, lm = self.opened.cfg, self.opened.lm
        config: Any = lm.module.config
        vocabulary = sorted(lm.tokenizer.get_vocab().items())
        return {
            **plain_settings(cfg, ("model.", "data.")),
            "model.hookpoint": ",".join(self.names),
            "model.dtype": _name(lm.dtype),
            "model.config": digest_of(config.to_diff_dict()),
            "model.tokenizer": digest_of(vocabulary),
            "data.text": text_digest(self.opened.documents),
            "hookpoints": self.names,
            "widths": self.widths,
            "dtype": _name(self.dtype),
            "run.seed": cfg.run.seed,
            "stream.sequences_per_forward": cfg.stream.sequences_per_forward,
            "harvest.tokens": self.tokens,
            "harvest.shard_tokens": self.shard_tokens,
            "piece_bytes": shard_files.PIECE_BYTES,
            "device": lm.device.type,
            **{package: version(package) for package in PACKAGES},
        }

    @torch.no_grad()
    def add(self, draft: Draft, contexts: Contexts) -> None:
        """Run the model on contexts and put what it computes on kept tokens into the draft."""
        captured = self.reader.read(contexts.tokens)
        is_kept = contexts.is_kept.to(captured[0].device)
        rows = tuple(activations[is_kept].to(self.dtype) for activations in captured)
        for name, kept in zip(self.names, rows, strict=True):
            require_finite(kept, name, "of one forward pass")
        moments = [Moments.of(kept) for kept in rows]
        draft.add(split_pieces(contexts, tuple(kept.cpu() for kept in rows)), moments)


class _Harvest:
    """One go at the shards that are not there."""

    def __init__(
        self, plan: _Plan, writer: ShardWriter, damaged: Sequence[int], tell: Tell, expected: int
    ) -> None:
        self.plan, self.writer, self.damaged = plan, writer, damaged
        self.tell, self.expected = tell, expected
        self.rows = 0  # in the shards passed so far

    def run(self) -> Manifest:
        """Make what is missing; return the complete manifest."""
        manifest = self.writer.manifest
        end = manifest.end
        if end is None or self.damaged:
            batches = self.plan.batches()
            self._pass_listed(batches, manifest)
            end = end or self._make_the_rest(batches, len(manifest.shards))
        self.writer.wait()
        if has_statistics(self.writer.folder, self.writer.manifest):
            return self.writer.manifest
        return self.writer.finish(end)

    def _pass_listed(self, batches: Iterator[Contexts], manifest: Manifest) -> None:
        """Make damaged shards again and pass over the batches of the others."""
        for index, entry in enumerate(manifest.shards):
            if index in self.damaged:
                self.writer.put(index, self._draft(batches))
            else:
                deque(islice(batches, entry.batches), maxlen=0)
                self._count(entry.rows)
            if manifest.end and index >= max(self.damaged):
                return

    def _make_the_rest(self, batches: Iterator[Contexts], index: int) -> End:
        """Make the shards behind the listed ones, and say what ended them."""
        while True:
            draft = self._draft(batches)
            if draft.pieces:
                self.writer.put(index, draft)
                index += 1
            if draft.end is not None:
                break
        if index == 0:
            raise ValueError(
                "`data.source` must hold tokens that `data.mask` keeps, at least a context's if "
                "`harvest.tokens` is set; none was found. Give more text, raise it, or mask less."
            )
        return draft.end

    def _draft(self, batches: Iterator[Contexts]) -> Draft:
        """Run the passes of the next shard: until it is full, the text ends, or all are there."""
        draft = Draft()
        while draft.rows < self.plan.shard_tokens and draft.end is None:
            contexts = next(batches, None)
            if contexts is None:
                draft.end = "text"
                break
            contexts, is_last = _within(contexts, self._room())
            draft.batches += 1
            draft.end = "tokens" if is_last else None
            rows = draft.rows
            if len(contexts.tokens):
                self.plan.add(draft, contexts)
            self._count(draft.rows - rows)
        return draft

    def _room(self) -> int | None:
        return None if self.plan.tokens is None else self.plan.tokens - self.rows

    def _count(self, rows: int) -> None:
        self.rows += rows
        self.tell("harvesting", self.rows, max(self.expected, self.rows))


def _within(contexts: Contexts, room: int | None) -> tuple[Contexts, bool]:
    """Return the first contexts that keep at most `room` tokens, and whether no more fit.

    Contexts stay whole, so that a few tokens fewer than `room` may be kept.
    """
    if room is None:
        return contexts, False
    ends = contexts.is_kept.sum(1).cumsum(0)
    n = int((ends <= room).sum())
    cut = Contexts(contexts.tokens[:n], contexts.document_ids[:n], contexts.is_kept[:n])
    return cut, bool(n < len(ends) or ends[-1] == room)


def _require_an_end(documents: Documents, cfg: Config) -> None:
    if not isinstance(documents, LocalDocuments):
        require_tokens(cfg.harvest.tokens, cfg)


def _manifest_of(folder: Path, plan: _Plan) -> Manifest:
    """Return the folder's manifest, or a new one.

    Errors: ValueError where the folder holds another harvest, or anything else.
    """
    now = plan.identity()
    manifest = open_folder(folder)
    if manifest is None:
        return Manifest(now)
    if changed := differences(manifest.identity, now):
        raise ValueError(
            f"`harvest.folder` must hold the same harvest to be continued; in {folder} {changed}. "
            "Give the same settings, or another `--harvest.folder`."
        )
    return manifest


def _damaged(folder: Path, manifest: Manifest, tell: Tell) -> list[int]:
    """Return the numbers of the shards that are missing or not what was written."""
    damaged = []
    for index, entry in enumerate(manifest.shards):
        if not is_intact(folder, entry):
            damaged.append(index)
        tell("checking shards", index + 1, len(manifest.shards))
    return damaged


def _bytes_to_write(manifest: Manifest, damaged: Sequence[int], size: Size) -> int:
    again = sum(manifest.shards[index].bytes for index in damaged)
    return again + (0 if manifest.end else max(0, size.bytes - manifest.bytes))


def _say_what_is_there(
    folder: Path, manifest: Manifest, damaged: Sequence[int], say: Callable[[str], None]
) -> None:
    for index in damaged:
        say(f"{folder / manifest.shards[index].file} is missing or damaged: it is made again.")
    if manifest.shards and not manifest.is_complete:
        say(f"Continuing behind {manifest.rows:,} tokens in {len(manifest.shards)} shards.")


def _summary(cfg: Config, folder: Path, manifest: Manifest) -> str:
    early = ""
    if manifest.end == "text" and cfg.harvest.tokens is not None:
        early = (
            f"The text ended before the {cfg.harvest.tokens:,} tokens that were asked for: this is "
            "all of it, and the harvest is complete. "
        )
    n = len(manifest.shards)
    return (
        f"{early}{folder} holds {manifest.rows:,} tokens in {n} shard{'s' * (n > 1)}, "
        f"{readable(manifest.bytes)}."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
