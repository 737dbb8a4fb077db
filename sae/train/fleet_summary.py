"""The page that compares a fleet's members: `summary.html`, and its numbers as `summary.json`.

Read from the members' folders as they stand, so it can be written at any time: their settings from
the fleet's configuration, their figures from the last row of their `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sae.axes import Axis
from sae.config import FLEET_SETTINGS
from sae.configuration import flatten, read_run_config
from sae.files import write_json, write_text
from sae.train.fleet_members import SUMMARY_DATA, SUMMARY_PAGE, members_of
from sae.train.tracking import read_metrics

FIGURES = ("fvu", "l0", "dead_share", "loss")
# Along these a line of the plot runs: what chooses how sparse a code is.
OF_SPARSITY = ("k", "target_l0")
WIDTH, HEIGHT, MARGIN = 760, 380, 56


def write_summary(folder: Path) -> Path:
    """Write both files into a fleet's folder; return the page's path.

    Each member's figures are means over the tokens since the row before its last, at the end of
    training if it is over; None where it has no row yet, or where a figure was not finite.
    """
    rows = member_rows(folder)
    write_json(folder / SUMMARY_DATA, {"members": rows})
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = (files("sae.train") / "fleet_summary.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=folder.name,
        settings=list(rows[0]["settings"]),
        rows=rows,
        plot=plot_of(rows),
        frame=(WIDTH, HEIGHT, MARGIN),
    )
    write_text(folder / SUMMARY_PAGE, page)
    return folder / SUMMARY_PAGE


def member_rows(folder: Path) -> list[dict[str, Any]]:
    """Return name, settings and last figures of each member of a fleet's folder."""
    cfg = read_run_config(folder)
    swept = [key for setting, key in FLEET_SETTINGS.items() if getattr(cfg.fleet, setting)]
    rows = []
    for member in members_of(cfg):
        settings, logged = flatten(member.cfg), read_metrics(folder / member.name)
        last = logged[-1] if logged else {}
        figures = {name: last.get(name) for name in ("step", "tokens", *FIGURES)}
        chosen = {key: settings[key] for key in swept}
        rows.append({"name": member.name, "settings": chosen, **figures})
    return rows


@dataclass(frozen=True)
class Point:
    """One member in the plot, its place in pixels."""

    x: float
    y: float
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Plot:
    """FVU against L0, both on logarithmic axes; ticks are (pixels, label)."""

    lines: list[tuple[str, list[Point]]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def plot_of(rows: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Return the plot of the rows that have both figures, one line for what differs in sparsity
    alone; None where none has."""
    shown = [row for row in rows if row["l0"] and row["fvu"]]
    if not shown:
        return None
    x_axis = Axis([row["l0"] for row in shown], MARGIN, WIDTH - 16)
    y_axis = Axis([row["fvu"] for row in shown], HEIGHT - MARGIN, 16)
    lines: dict[str, list[Point]] = {}
    for row in sorted(shown, key=lambda row: row["l0"]):
        sparsity = [FLEET_SETTINGS[setting] for setting in OF_SPARSITY]
        others = {key: v for key, v in row["settings"].items() if key not in sparsity}
        line = lines.setdefault(", ".join(f"{k} {v}" for k, v in others.items()), [])
        line.append(Point(x_axis.at(row["l0"]), y_axis.at(row["fvu"]), row))
    return Plot(sorted(lines.items()), x_axis.ticks(), y_axis.ticks())
