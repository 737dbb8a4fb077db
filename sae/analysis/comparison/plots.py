"""The page's plots: a figure against L0 with its Pareto front, and the headline as strips.

Places in pixels alone; the template draws them. A dictionary keeps its number and colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sae.analysis.comparison.entries import Entry
from sae.analysis.comparison.figures import Figure, interval_of, on_front, value_of
from sae.axes import Axis

WIDTH, HEIGHT, MARGIN, EDGE = 460, 330, 60, 16
STRIP_WIDTH, STRIP_EDGE, RADIUS, FOOT = 460, 20, 8, 16
LOG_FROM = 3.0
"""Ratio of largest to smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Mark:
    """A dictionary in a plot; `low` and `high` are the ends of its interval, in pixels."""

    number: int
    x: float
    y: float
    low: float | None
    high: float | None
    title: str


@dataclass(frozen=True)
class Scatter:
    """A figure against L0; `front` joins those that nothing beats in both."""

    figure: Figure
    marks: list[Mark]
    front: list[tuple[float, float]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Strip:
    """One figure of every dictionary, along a line; marks that would cover others lie below."""

    figure: Figure
    marks: list[Mark]
    ticks: list[tuple[float, str]]
    height: float


def scatter(entries: Sequence[Entry], figure: Figure) -> Scatter | None:
    """Return the plot of `figure` against L0; None where no dictionary has it."""
    shown = [(i, entry, value) for i, entry, value in _with_values(entries, figure, {})]
    if not shown:
        return None
    l0s = [entry.results.provenance["l0"] for _, entry, _ in shown]
    x_axis = _axis(l0s, MARGIN, WIDTH - EDGE)
    y_axis = _axis(_reach(shown, figure), HEIGHT - MARGIN, EDGE)
    marks = [
        _mark(i, entry, figure, (x_axis.at(l0), y_axis.at(value)), y_axis, value)
        for (i, entry, value), l0 in zip(shown, l0s, strict=True)
    ]
    best = on_front(entries, figure.metric, figure.better)
    front = sorted((mark.x, mark.y) for mark in marks if entries[mark.number - 1].name in best)
    return Scatter(figure, marks, front, x_axis.ticks(), y_axis.ticks())


def strip(entries: Sequence[Entry], figure: Figure, pw_mcc: Mapping[str, float]) -> Strip:
    """Return the line of one figure."""
    shown = _with_values(entries, figure, pw_mcc)
    axis = Axis(_reach(shown, figure), STRIP_EDGE, STRIP_WIDTH - STRIP_EDGE, linear=True)
    lanes = _lanes([axis.at(value) for _, _, value in shown])
    step = 2 * RADIUS + 2
    marks = [
        _mark(i, entry, figure, (axis.at(value), lane * step + RADIUS + 2), axis, value)
        for (i, entry, value), lane in zip(shown, lanes, strict=True)
    ]
    return Strip(figure, marks, axis.ticks(), step * (max(lanes) + 1) + FOOT + 4)


def _lanes(places: Sequence[float]) -> list[int]:
    """Return for each place the first lane in which no earlier one lies so near that they touch."""
    lanes: list[int] = []
    for i, place in enumerate(places):
        taken = {lanes[j] for j in range(i) if abs(places[j] - place) < 2 * RADIUS}
        lanes.append(next(lane for lane in range(i + 1) if lane not in taken))
    return lanes


def _with_values(
    entries: Sequence[Entry], figure: Figure, pw_mcc: Mapping[str, float]
) -> list[tuple[int, Entry, float]]:
    values = [(i, entry, value_of(entry, figure.metric, pw_mcc)) for i, entry in enumerate(entries)]
    return [(i + 1, entry, value) for i, entry, value in values if value is not None]


def _reach(shown: Sequence[tuple[int, Entry, float]], figure: Figure) -> list[float]:
    """Return all values that an axis must show, the ends of intervals too."""
    ends = [interval_of(entry, figure.metric) or () for _, entry, _ in shown]
    return [value for _, _, value in shown] + [end for pair in ends for end in pair]


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    is_log = min(values) > 0 and max(values) / min(values) >= LOG_FROM
    return Axis(values, start, end, linear=not is_log)


def _mark(
    number: int, entry: Entry, figure: Figure, at: tuple[float, float], axis: Axis, value: float
) -> Mark:
    ends = interval_of(entry, figure.metric)
    low, high = (None, None) if ends is None else (axis.at(ends[0]), axis.at(ends[1]))
    title = f"{entry.name}: {figure.text} {value:.4g} at L0 {entry.results.provenance['l0']:.4g}"
    return Mark(number, *at, low, high, title)
