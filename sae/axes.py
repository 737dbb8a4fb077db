"""Axes of the plots on HTML pages, drawn as SVG: where a value lies, and which values are marked.

No library of plots: a page holds a few dozen marks, takes its colours from the page's own style, in
the dark too, and opens from disk without a script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

N_TICKS = 5
ROOM = 0.08


class Axis:
    """An axis from `start` to `end` in pixels, a little wider than its values.

    Logarithmic by default, which needs values above 0; `linear` takes any.
    """

    def __init__(
        self, values: Sequence[float], start: float, end: float, *, linear: bool = False
    ) -> None:
        self.is_linear = linear
        places = [self._place(value) for value in values]
        room = ROOM * (max(places) - min(places)) + 0.02 * (1 if not linear else self._size(places))
        self.low, self.high = min(places) - room, max(places) + room
        self.start, self.end = start, end

    @staticmethod
    def _size(places: Sequence[float]) -> float:
        return max(map(abs, places)) or 1.0

    def _place(self, value: float) -> float:
        return value if self.is_linear else math.log(value)

    def at(self, value: float) -> float:
        """Return where a value lies, in pixels."""
        share = (self._place(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Return places with the values there: evenly spaced, of a linear axis round numbers."""
        if self.is_linear:
            return self._round_ticks()
        step = (self.high - self.low) / (N_TICKS - 1)
        values = [math.exp(self.low + step * i) for i in range(N_TICKS)]
        return [(self.at(value), f"{value:.3g}") for value in values]

    def _round_ticks(self) -> list[tuple[float, str]]:
        rough = (self.high - self.low) / N_TICKS
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(self.at(i * step), f"{i * step:.{digits}f}") for i in range(first, last + 1)]
