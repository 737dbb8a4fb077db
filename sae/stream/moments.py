"""Mean, variance and mean norm of rows, mergeable: any split of the rows gives the same figures.

Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance" (the pairwise
form of Welford's update).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_ONCE = 8192  # so that the float64 copy stays small


@dataclass(frozen=True)
class Moments:
    """What is known of `count` rows; all float64, in CPU memory.

    Shapes: mean (d); m2 (d), the sum of squared deviations from the mean; mean_norm (1), the mean
    of the rows' Euclidean norms.
    """

    count: int
    mean: Tensor
    m2: Tensor
    mean_norm: Tensor

    @classmethod
    def none(cls, d: int) -> Moments:
        """Return the moments of no rows of width d: what others are merged into."""
        zeros = torch.zeros(d, dtype=torch.float64)
        return cls(0, zeros, zeros, zeros.new_zeros(1))

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Return the moments of (n, d) rows, computed on their device."""
        chunks = (chunk.double() for chunk in rows.split(ROWS_AT_ONCE) if len(chunk))
        return merged((_of_chunk(chunk) for chunk in chunks), rows.shape[1])

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta.square() * (self.count * share),
            self.mean_norm + (other.mean_norm - self.mean_norm) * share,
        )

    @property
    def variance(self) -> Tensor:
        """Each dimension's variance, (d), divided by the count."""
        return self.m2 / max(self.count, 1)


def merged(parts: Iterable[Moments], d: int) -> Moments:
    """Return the moments of all parts together, merged in their order."""
    whole = Moments.none(d)
    for part in parts:
        whole = whole.merge(part)
    return whole


def _of_chunk(x: Tensor) -> Moments:
    mean = x.mean(0)
    m2 = (x - mean).square_().sum(0)
    return Moments(len(x), mean.cpu(), m2.cpu(), x.norm(dim=1).mean().reshape(1).cpu())
