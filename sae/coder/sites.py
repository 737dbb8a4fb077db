"""Where a coder reads and where it writes: the places that a row of activations holds.

A row is a token's activations at all places, side by side: those that are read, then those that are
written, where these are others.

| site | reads | writes |
|---|---|---|
| sae | one place | the same |
| transcoder | one place, such as a module's input | another, such as its output |
| crosscoder | several places, of one model or of two | the same |
| cross_layer | the inputs of several layers | their outputs: a latent its own and later ones |
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

from sae.config import CoderConfig


@dataclass(frozen=True)
class Sites:
    """The widths of the places in a row.

    Attributes:
        reads: widths of the places that are encoded. writes: of those that are reconstructed;
            None: the same places.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...] | None = None

    @classmethod
    def of(cls, cfg: CoderConfig, widths: tuple[int, ...]) -> Sites:
        """Return what `cfg.site` makes of a row's places.

        Errors: ValueError where it needs another number of places, or others than these widths.
        """
        n = len(widths)
        rule = {
            "sae": (n == 1, "one place"),
            "transcoder": (n == 2, "two places, the one that is read and the one that is written"),
            "crosscoder": (n >= 2, "at least two places"),
            "cross_layer": (
                n >= 4 and n % 2 == 0,
                "at least two layers, each with the place that is read and the one that is written",
            ),
        }[cfg.site]
        if not rule[0]:
            raise ValueError(
                f"`coder.site: {cfg.site}` needs {rule[1]}; got {n}, of widths {list(widths)}. "
                "Name them in `model.hookpoint` (and `model.target`), or give them to `sae.fit` as "
                "a list of matrices."
            )
        if cfg.site == "cross_layer" and len(set(widths)) > 1:
            raise ValueError(
                "`coder.site: cross_layer` needs places of one width; got widths "
                f"{list(widths)}. Choose modules of one width, or train a crosscoder."
            )
        if cfg.site in ("sae", "crosscoder"):
            return cls(widths)
        return cls(widths[: n // 2], widths[n // 2 :])

    @property
    def written_widths(self) -> tuple[int, ...]:
        """The widths of the places that are written."""
        return self.reads if self.writes is None else self.writes

    @property
    def d_in(self) -> int:
        """Numbers of a row that are read."""
        return sum(self.reads)

    @property
    def d_out(self) -> int:
        """Numbers of a row that are written."""
        return sum(self.written_widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of all places of a row."""
        return (*self.reads, *(self.writes or ()))

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return sum(self.widths)

    @property
    def read_columns(self) -> slice:
        """The columns of a row that are read."""
        return slice(0, self.d_in)

    @property
    def written_columns(self) -> slice:
        """The columns of a row that are written."""
        return self.read_columns if self.writes is None else slice(self.d_in, self.width)

    def columns(self) -> list[slice]:
        """Return every place's columns of a row, in order."""
        ends = list(accumulate(self.widths, initial=0))
        return [slice(start, end) for start, end in pairwise(ends)]

    def read(self, rows: Tensor) -> Tensor:
        """Return what is encoded, (…, d_in), of rows (…, width)."""
        return rows[..., self.read_columns]

    def written(self, rows: Tensor) -> Tensor:
        """Return what is to be reconstructed, (…, d_out), of rows (…, width)."""
        return rows[..., self.written_columns]
