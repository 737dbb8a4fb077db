"""Where the log's rows go: always `metrics.jsonl`, and wandb or tensorboard where asked.

A row is a flat dict with `step` and `tokens`. Trackers are made on the main process only.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sae.config import Config
from sae.configuration import flatten
from sae.files import explained_write, write_text

METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Receives rows."""

    def log(self, row: Mapping[str, float]) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """Write what is held back."""
        ...


class JsonlTracker:
    """Append rows to `metrics.jsonl`; rows after the step that a resumed run starts at are cut."""

    def __init__(self, folder: Path, start_step: int):
        self.path = folder / METRICS_FILE
        kept = [row for row in read_metrics(folder) if row["step"] <= start_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, row: Mapping[str, float]) -> None:
        """Append one line; what is not finite becomes null, as JSON has no NaN."""
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        with explained_write(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        """Do nothing: each row is on disk."""


class WandbTracker:
    """Send rows to Weights & Biases; a resumed run continues the same wandb run."""

    def __init__(self, folder: Path, config: Config):
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError(
                "`run.trackers` wandb needs the package wandb; it is not installed. "
                "pip install wandb"
            ) from error
        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4))
        self.run = wandb.init(
            project=config.run.wandb_project,
            name=folder.name,
            id=id_file.read_text(),
            resume="allow",
            reinit="create_new",  # a fleet has a run a member, all open at once
            dir=str(folder),
            config=flatten(config),
        )

    def log(self, row: Mapping[str, float]) -> None:
        """Send one row."""
        self.run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        """Wait until all rows are sent."""
        self.run.finish()


class TensorboardTracker:
    """Write rows as TensorBoard scalars to `tensorboard/` in the run folder."""

    def __init__(self, folder: Path, start_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(
                "`run.trackers` tensorboard needs the package tensorboard; it is not installed. "
                "pip install 'sae[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=start_step or None)

    def log(self, row: Mapping[str, float]) -> None:
        """Write each number of the row."""
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Write what is held back."""
        self.writer.close()


def open_trackers(config: Config, folder: Path, start_step: int) -> list[Tracker]:
    """Return the trackers that `run.trackers` names, `metrics.jsonl` first."""
    makers = {
        "wandb": lambda: WandbTracker(folder, config),
        "tensorboard": lambda: TensorboardTracker(folder, start_step),
    }
    return [JsonlTracker(folder, start_step), *(makers[name]() for name in config.run.trackers)]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `metrics.jsonl`; a last line cut by a kill is left out."""
    path = folder / METRICS_FILE
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
