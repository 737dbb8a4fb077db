"""The section `run`: where a run lives, on what it runs, and who follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .names import TrackerName


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives, on what it runs, and who follows it."""

    folder: str | None = None
    """The run's folder; None: `runs/` and the name of the YAML file."""

    seed: int = 0
    """Seed of everything random: weights, order of data, buffer."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model and the coder; auto: a GPU where there is one."""

    trackers: tuple[TrackerName, ...] = ()
    """Trackers besides metrics.jsonl, which is always written."""

    wandb_project: str = "sae"
    """The wandb project that receives the run."""
