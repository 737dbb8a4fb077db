"""What a person sees while training: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sae.config import TrainConfig
from sae.train.schedule import n_steps

LINES_WITHOUT_TERMINAL = 20


class ShowsRows(Protocol):
    """Receives the log's rows, to show them."""

    def show(self, row: Mapping[str, float]) -> None:
        """Show a row of the log."""
        ...


class TrainProgress:
    """Show tokens, tokens/s, time left, FVU, L0 and the dead share.

    Args:
        cfg: says how long the run is. seen_tokens: where a resumed run starts.
        is_shown: False on all but the main process, and where nobody should be told.
    """

    def __init__(self, cfg: TrainConfig, *, seen_tokens: int = 0, is_shown: bool = True):
        self.console = Console(quiet=not is_shown, stderr=True)
        self.total, self.last_line = n_steps(cfg) * cfg.batch_tokens, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not (is_shown and self.console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task(
            "training", total=self.total, completed=seen_tokens, figures=""
        )
        self._next_line = 0.0

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def filling(self, rows: int, capacity: int) -> None:
        """Show how far the buffer's first fill has come."""
        self._bar.update(self._task, figures=f"filling the buffer: {rows:,} of {capacity:,} tokens")
        if not self.console.is_terminal and time.monotonic() - self.last_line > 20:
            self.say(f"filling the buffer: {rows:,} of {capacity:,} tokens")

    def say(self, text: str) -> None:
        """Print one line."""
        self.last_line = time.monotonic()
        self.console.print(text, highlight=False)

    def show(self, row: Mapping[str, float]) -> None:
        """Show a row of the log."""
        tokens = row["tokens"]
        figures = (
            f"{row['tokens_per_second']:,.0f} tokens/s  FVU {row['fvu']:.4f}  L0 {row['l0']:.1f}  "
            f"dead {row['dead_share']:.1%}"
        )
        self._bar.update(self._task, completed=tokens, figures=figures)
        if not self.console.is_terminal and tokens >= self._next_line:
            self.say(f"{tokens / self.total:4.0%}  {tokens:,.0f} tokens  {figures}")
            self._next_line = tokens + self.total / LINES_WITHOUT_TERMINAL
