"""Writing so that nothing is ever lost or half-written: write beside, fsync, rename.

A reader sees the old file or the new one, after a kill at any moment too. A write that fails (disk
full, no permission) leaves what was there and says what to do.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def explained_write(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into an error that says what happened and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        text = str(error)
        is_full = number in NO_SPACE or any(f"os error {code}" in text for code in NO_SPACE)
        cause = "the disk is full" if is_full else text
        raise RuntimeError(
            f"`{path}` must be writable; {cause}. What was there before is unharmed. "
            "Free space or choose another folder, then run the same command again."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    beside = partial_path(path)
    with explained_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(text, encoding="utf-8")
            sync(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically; NaN and infinity are refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    beside = partial_path(path)
    with explained_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(contiguous, beside, metadata={"format": "pt"})
            sync(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path`, whole, when the block ends well.

    An older `path` is replaced. When the block fails, `path` is as it was.
    """
    beside = partial_path(path)
    with explained_write(path):
        _recover(path)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    try:
        with explained_write(path):
            yield beside
            sync(beside)
            _replace_folder(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """Return where `path` is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def _aside_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _recover(path: Path) -> None:
    """Give a folder its name back that stepped aside before a kill."""
    if _aside_path(path).exists() and not path.exists():
        _aside_path(path).rename(path)


def _replace_folder(beside: Path, path: Path) -> None:
    """Rename `beside` to `path`; a full folder cannot be renamed onto, so it steps aside first."""
    aside = _aside_path(path)
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
    try:
        beside.rename(path)
    except OSError:
        _recover(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict:
    """Read a JSON file, naming it when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` must be JSON; {error}. The file is damaged.") from error
