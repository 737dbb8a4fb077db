"""Scores drawn on the line from shuffled codes to the truth, or to a perfect dictionary.

The line's left end is what the same dictionary scores with its codes shuffled in time, the right
end the truth's score where the world is known, else the best there is. The dictionary is a dot,
with its 95% interval; every other null a numbered mark. Marks that would lie on one another take
another row below the line; what lies beyond an end is at the edge, dashed. Scores that shuffled
codes reach too stand apart: they do not see which token a code belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sae.evals.registry import EVALS
from sae.evals.results import EvalResults, TableRow, table_rows
from sae.evals.scale import TRUTH, ZERO, Scale, scale_of

LEFT, RIGHT = 4.0, 96.0
"""Where 0 and 1 of a line are, in percent of its width; beyond them is room for what exceeds."""
EDGES = (0.8, 99.2)
CLEARANCE = 6.5
"""Percent of the width that two marks in one row are apart at least."""


@dataclass(frozen=True)
class Mark:
    """A null on a line: its number in the legend, place in percent, row, words."""

    number: int
    left: float
    lane: int
    words: str
    is_beyond: bool


@dataclass(frozen=True)
class Line:
    """One score's line; `interval` is its left end and width in percent, or None."""

    group: str
    label: str
    value: str
    share: str
    ends: tuple[str, str]
    left: float
    is_beyond: bool
    interval: tuple[float, float] | None
    marks: list[Mark]

    @property
    def is_blind(self) -> bool:
        """Whether the dictionary scores what it scores with its codes shuffled."""
        return float(self.share) == 0

    @property
    def lanes(self) -> int:
        """Rows of marks below the line."""
        return max((mark.lane + 1 for mark in self.marks), default=0)


@dataclass(frozen=True)
class Scales:
    """Lines, those of scores that shuffled codes reach, and the legend.

    The legend's rows are number, name, how it is made, what it destroys.
    """

    lines: list[Line] = field(default_factory=list)
    blind: list[Line] = field(default_factory=list)
    legend: list[tuple[int, str, str, str]] = field(default_factory=list)
    has_truth: bool = False


def scales_of(results: EvalResults | None) -> Scales:
    """Return the lines of every score that has one."""
    if results is None or ZERO not in results.nulls:
        return Scales()
    marked = [name for name in results.nulls if name not in (ZERO, TRUTH)]
    numbers = {name: number for number, name in enumerate(marked, 1)}
    lines = [
        line for row in table_rows(results) if (line := _line(row, results, numbers)) is not None
    ]
    legend = [
        (number, name, results.nulls[name].how, results.nulls[name].destroys)
        for name, number in numbers.items()
    ]
    seeing, blind = ([line for line in lines if line.is_blind == which] for which in (False, True))
    return Scales(seeing, blind, legend, TRUTH in results.nulls)


def _line(row: TableRow, results: EvalResults, numbers: Mapping[str, int]) -> Line | None:
    groups = {str(name): eval_row.labels for name, eval_row in EVALS.items()}
    label = groups.get(row.group, {}).get(row.metric)
    scale = None if label is None else scale_of(row.metric, label, results)
    value = results.metrics[row.metric]
    if scale is None or value is None:
        return None
    shown = dict(zip(results.nulls, row.nulls, strict=True))
    left, is_beyond = place(scale.share(value))
    return Line(
        group=row.group,
        label=row.label,
        value=row.value,
        share=row.share,
        ends=(shown[ZERO], shown[TRUTH] if scale.is_truth else f"{scale.one:g}"),
        left=left,
        is_beyond=is_beyond,
        interval=_interval(row.metric, results, scale),
        marks=_marks(row.metric, results, scale, numbers, shown),
    )


def place(share: float) -> tuple[float, bool]:
    """Return where on a line a share lies, in percent of its width, and whether it is beyond."""
    at = LEFT + share * (RIGHT - LEFT)
    within = min(max(at, EDGES[0]), EDGES[1])
    return round(within, 2), within != at


def _interval(metric: str, results: EvalResults, scale: Scale) -> tuple[float, float] | None:
    ends = [results.metrics.get(f"{metric}/{end}") for end in ("low", "high")]
    known = [place(scale.share(end))[0] for end in ends if end is not None]
    return (min(known), round(max(known) - min(known), 2)) if len(known) == 2 else None


def _marks(
    metric: str,
    results: EvalResults,
    scale: Scale,
    numbers: Mapping[str, int],
    shown: Mapping[str, str],
) -> list[Mark]:
    """Return the marks from left to right, each in the first row with room for it."""
    values = {name: results.nulls[name].metrics.get(metric) for name in numbers}
    places = {
        name: place(scale.share(value)) for name, value in values.items() if value is not None
    }
    ends: list[float] = []
    marks = []
    for name in sorted(places, key=lambda name: places[name][0]):
        left, is_beyond = places[name]
        lane = next((i for i, end in enumerate(ends) if left - end >= CLEARANCE), len(ends))
        ends[lane : lane + 1] = [left]
        marks.append(Mark(numbers[name], left, lane, f"{name}: {shown[name]}", is_beyond))
    return marks
