"""`compare.html`: plots and tables in one file that opens from disk, without a script."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from sae.analysis.comparison import plots
from sae.analysis.comparison.entries import Entry
from sae.analysis.comparison.figures import Figure, as_number, interval_of
from sae.evals.interface import Label, Unit
from sae.evals.pairing import Difference
from sae.evals.registry import EVALS
from sae.evals.results import shown
from sae.files import write_text

if TYPE_CHECKING:
    from sae.analysis.comparison import Comparison

AGAINST_L0 = ("fvu", "loss_recovered_mean", "f1")


@dataclass(frozen=True)
class Cell:
    """A value, its interval, and its difference from the first dictionary, as text."""

    value: str
    interval: str = ""
    difference: str = ""
    is_clear: bool = False


def write_page(found: Comparison, path: Path) -> Path:
    """Write the page; return its path."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = (files("sae.analysis.comparison") / "page.html.j2").read_text(encoding="utf-8")
    against = [figure for figure in found.figures if figure.metric in AGAINST_L0]
    scatters = [plots.scatter(found.entries, figure) for figure in against]
    page = environment.from_string(template).render(
        entries=found.entries,
        is_paired=found.is_paired,
        origin=where(found),
        figures=found.figures,
        headings=[heading(figure.text, figure.unit) for figure in found.figures],
        headline=[_headline(found, entry) for entry in found.entries],
        scatters=[one for one in scatters if one is not None],
        strips=[plots.strip(found.entries, figure, found.pw_mcc) for figure in found.figures],
        groups=everything(found),
        frame=(plots.WIDTH, plots.HEIGHT, plots.MARGIN, plots.EDGE),
        strip_width=plots.STRIP_WIDTH,
        foot=plots.FOOT,
    )
    write_text(path, page)
    return path


def where(found: Comparison) -> str:
    """Return on what the dictionaries were measured, in words."""
    origin = found.entries[0].results.provenance
    if not found.is_paired:
        return "Measured on tokens of their own: differences between them are not theirs alone."
    documents = f"{origin['n_tokens']:,} tokens of {origin['n_documents']:,} documents"
    if world := origin.get("world"):
        return f"All on the same {origin['n_tokens']:,} samples of the world {world.get('name')}."
    if origin.get("model") is None:
        return f"All on the same {documents}."
    return f"All on the same {documents}, at {origin['hookpoint']} of {origin['model']}."


def _headline(found: Comparison, entry: Entry) -> list[Cell]:
    return [
        cell(
            found, entry, figure.metric, Label(figure.text, figure.unit), found.value(entry, figure)
        )
        for figure in found.figures
    ]


def cell(found: Comparison, entry: Entry, metric: str, label: Label, value: float | None) -> Cell:
    """Return what a table says of a metric of a dictionary."""
    if value is None:
        return Cell("–")
    ends = interval_of(entry, metric)
    between = "" if ends is None else " … ".join(_number(end, label) for end in ends)
    one = found.from_first(entry).get(metric)
    if one is None:
        return Cell(_number(value, label), between)
    return Cell(_number(value, label), between, difference_text(one, label), one.is_clear)


def difference_text(one: Difference, label: Label) -> str:
    """Return a difference with its interval, signed."""
    low, high = as_number(one.low), as_number(one.high)
    text = _signed(one.value, label)
    if low is None or high is None:
        return text
    return f"{text} ({_signed(low, label)} … {_signed(high, label)})"


def _signed(value: float, label: Label) -> str:
    sign = "−" if value < 0 else "+"
    return sign + _number(abs(value), label)


def _number(value: float, label: Label) -> str:
    """Return a number short enough for a narrow table: its unit stands in the heading."""
    return shown(value, label.unit, digits=3).removesuffix(" nats")


def heading(text: str, unit: Unit) -> str:
    """Return a metric's words with the unit that its numbers are without."""
    return f"{text}, nats" if unit == "nats" else text


def everything(found: Comparison) -> list[tuple[str, list[tuple[str, list[Cell]]]]]:
    """Return all metrics by eval: (eval, [(words, one cell a dictionary), …]), …"""
    groups = []
    for name, row in EVALS.items():
        rows = []
        for metric, label in row.labels.items():
            values = [entry.results.metrics.get(metric) for entry in found.entries]
            if all(value is None for value in values):
                continue
            pairs = zip(found.entries, values, strict=True)
            cells = [cell(found, entry, metric, label, value) for entry, value in pairs]
            rows.append((heading(label.text, label.unit), cells))
        if rows:
            groups.append((name, rows))
    return groups


def table_figures(found: Comparison) -> list[tuple[Figure, list[Cell]]]:
    """Return the headline by figure, one cell a dictionary: the printed table."""
    by_entry = [_headline(found, entry) for entry in found.entries]
    return [(figure, [row[i] for row in by_entry]) for i, figure in enumerate(found.figures)]
