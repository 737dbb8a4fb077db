"""`sae.load`: find out what a path holds and read it as a coder.

To add a format: a row in FORMATS with how to recognise it and how to read it.
"""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sae.coder import SparseCoder, load_dictionary
from sae.coder.dictionary import CFG_FILE, WEIGHTS_FILE, read_config, unfilled_coder

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Format:
    """One kind of file or folder: how to recognise it, how to read it."""

    is_here: Callable[[Path], bool]
    read: Callable[[Path], SparseCoder]


def _is_saelens(folder: Path) -> bool:
    return (folder / CFG_FILE).exists() and (folder / WEIGHTS_FILE).exists()


FORMATS: dict[str, Format] = {"saelens": Format(_is_saelens, load_dictionary)}


def load(path: str | Path, format: str | None = None, *, allow_pickle: bool = False) -> SparseCoder:
    """Return the coder that `path` holds.

    Args:
        path: a dictionary folder, a run folder (its `final/` or, before that exists, its newest
            checkpoint), a `.pt` state dict beside a `cfg.json`, or a hub id `owner/name` or
            `owner/name/folder`.
        format: one of FORMATS; None recognises it.
        allow_pickle: open files that carry pickled code, which runs when they are opened.

    Errors: ValueError for a path that holds nothing readable, for a damaged file, and for pickled
    code that was not asked for.
    """
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, 1)
        raise ValueError(
            f"`format` must be one of {sorted(FORMATS)}; got {format!r}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    place = Path(path) if Path(path).exists() else _from_hub(str(path))
    if place.is_file() and place.suffix in PICKLE_SUFFIXES:
        return load_state_dict_file(place, allow_pickle=allow_pickle)
    place = dictionary_folder(place)
    if not place.is_dir():
        raise ValueError(f"`path` must hold a folder of that name; {path} has none.")
    for row in [FORMATS[format]] if format else FORMATS.values():
        if row.is_here(place):
            return row.read(place)
    raise ValueError(
        f"`path` must hold a dictionary ({CFG_FILE} and {WEIGHTS_FILE}) or a run; "
        f"{place} holds {sorted(p.name for p in place.iterdir())[:8]}."
    )


def dictionary_folder(path: Path) -> Path:
    """Return where the dictionary of `path` lies: the path itself, or inside a run folder."""
    if path.is_file():
        return path.parent
    if (path / CFG_FILE).exists():
        return path
    candidates = [path / "final", *sorted((path / "checkpoints").glob("step_*"), reverse=True)]
    return next((folder for folder in candidates if _is_saelens(folder)), path)


def load_state_dict_file(path: Path, *, allow_pickle: bool) -> SparseCoder:
    """Read `torch.save(coder.state_dict())`, whose `cfg.json` lies beside it."""
    if not path.with_name(CFG_FILE).exists():
        raise ValueError(f"`{path}` must lie beside its {CFG_FILE}; it is not there.")
    coder = unfilled_coder(read_config(path.with_name(CFG_FILE)), path.parent)
    state = _read_pickle(path, allow_pickle)
    try:
        coder.load_state_dict({name: state[name] for name in coder.state_dict()})
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"`{path}` must hold {list(coder.state_dict())} in the shapes of {CFG_FILE}; {error}."
        ) from error
    return coder


def _read_pickle(path: Path, allow_pickle: bool) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"`{path}` must be a whole torch file; {error}.") from error
    except pickle.UnpicklingError as error:
        if allow_pickle:
            return torch.load(path, map_location="cpu", weights_only=False)
        raise ValueError(
            f"`path` must hold tensors alone; {path} carries pickled code, which would run when "
            "opened. Where you trust its author, pass allow_pickle=True, then save it again."
        ) from error


def _from_hub(name: str) -> Path:
    """Download a dictionary folder from the Hugging Face hub and return where it lies."""
    parts = name.strip("/").split("/")
    if len(parts) < 2 or name.startswith((".", "/", "~")):
        raise ValueError(f"`path` must exist or be a hub id owner/name; got {name!r}.")
    from huggingface_hub import snapshot_download

    inside = "/".join(parts[2:])
    pattern = f"{inside}/*" if inside else "*"
    try:
        root = snapshot_download(
            "/".join(parts[:2]), allow_patterns=[pattern], ignore_patterns=list(_pickle_globs())
        )
    except Exception as error:
        raise ValueError(
            f"`path` must exist or be a reachable hub id; got {name!r} ({type(error).__name__}: "
            f"{error}). Check the spelling and the network."
        ) from error
    return dictionary_folder(Path(root) / inside)


def _pickle_globs() -> tuple[str, ...]:
    return tuple(f"*{suffix}" for suffix in PICKLE_SUFFIXES)
