"""Nulls that were trained: read from their folders, and measured where they belong.

A twin is the dictionary's equal in all but one thing: a frozen decoder, shuffled activations, a
model with the weights it has before its own training. Of the last, the activations are that
model's, so it is measured on them, on the same documents; the others walk beside the dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae.config import Config, ModelConfig
from sae.configuration import CONFIG_FILE, read_run_config
from sae.evals.null_rows import NULLS, checked_nulls, short_name
from sae.interop import load

PLACES = ("name", "hookpoint", "target", "other")
FROM_METADATA = {"name": "model_name", "hookpoint": "hook_name", "target": "hook_name_out"}


@dataclass(frozen=True)
class Twin:
    """A dictionary from a folder, and the model that it is of."""

    coder: Any
    model: ModelConfig


def names_and_twins(cfg: Config, coder: Any) -> tuple[tuple[str, ...], dict[str, Twin]]:
    """Return the names in `eval.nulls` that are rows of NULLS, and the dictionaries at its paths.

    Errors: ValueError for a name that is neither, and a dictionary that is not the other's equal in
        width, number of latents, place and model.
    """
    given = checked_nulls(cfg.eval.nulls)
    twins: dict[str, Twin] = {}
    for path in (name for name in given if name not in NULLS):
        twins[short_name(path, twins)] = _opened(Path(path), cfg, coder)
    return tuple(name for name in given if name in NULLS), twins


def _opened(path: Path, cfg: Config, coder: Any) -> Twin:
    twin = load(path)
    said = _says(path, twin)
    for name, own, its in (
        ("d_in", coder.d_in, twin.d_in),
        ("d_sae", coder.d_sae, twin.d_sae),
        ("site", coder.cfg.site, twin.cfg.site),
        ("world", cfg.world, said.world if cfg.world.name else cfg.world),
        *((key, getattr(cfg.model, key), getattr(said.model, key)) for key in PLACES),
    ):
        if own != its and its not in ("", None):
            raise ValueError(
                f"a null must have the {name} of the dictionary; `{path}` has {its!r}, the "
                f"dictionary {own!r}. Train it as the dictionary was but for what it is a null of."
            )
    return Twin(twin, replace(cfg.model, reinitialised=said.model.reinitialised))


def _says(path: Path, coder: Any) -> Config:
    """Return what a run's folder says of model and world; of a dictionary alone, its metadata."""
    if (path / CONFIG_FILE).exists():
        return read_run_config(path)
    told = {key: coder.metadata.get(name) or None for key, name in FROM_METADATA.items()}
    model = ModelConfig(**{key: value for key, value in told.items() if value is not None})
    return Config(model=replace(model, reinitialised=coder.metadata.get("model_reinitialised")))
