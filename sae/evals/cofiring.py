"""What fires together with what: the joint sums of a code and the true code.

Both codes are sparse, so that only pairs that are on in one row are touched: n · l0 · true l0 steps
a batch. The tables themselves are dense: 16 bytes for each pair of a latent and a feature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.latents import Latents

PAIRS_AT_ONCE = 2**22
HALVES = 2


class Cofiring:
    """Joint sums over rows, split into two halves by the row's number.

    Attributes:
        both: (2, m, n) int32, rows of each half in which latent and feature fire.
        latent, feature: (2, m), (2, n) int64, rows in which each fires. rows: (2) int64.
        product: (m, n) float64, Σ z a. moments: "z", "z2" (m), "a", "a2" (n) float64.
    """

    def __init__(self, m: int, n: int) -> None:
        self.both = torch.zeros(HALVES, m, n, dtype=torch.int32)
        self.latent = torch.zeros(HALVES, m, dtype=torch.int64)
        self.feature = torch.zeros(HALVES, n, dtype=torch.int64)
        self.rows = torch.zeros(HALVES, dtype=torch.int64)
        self.product = torch.zeros(m, n, dtype=torch.float64)
        sizes = {"z": m, "z2": m, "a": n, "a2": n}
        self.moments = {key: torch.zeros(size, dtype=torch.float64) for key, size in sizes.items()}

    def update(self, latents: Latents, true: Latents, half: Tensor) -> None:
        """Add rows, (n, k) and (n, k') on the CPU; half (n) is 0 or 1."""
        self.rows += torch.bincount(half, minlength=HALVES)
        for code, fires, names in (
            (latents, self.latent, ("z", "z2")),
            (true, self.feature, ("a", "a2")),
        ):
            values, size = code.values.double(), fires.shape[1]
            place = (half[:, None] * size + code.indices)[values != 0]
            fires += torch.bincount(place, minlength=HALVES * size).view_as(fires)
            for power, name in enumerate(names, 1):
                sums = self.moments[name]
                sums.index_add_(0, code.indices.flatten(), values.pow(power).flatten())
        size = max(PAIRS_AT_ONCE // (latents.values.shape[1] * true.values.shape[1]), 1)
        for start in range(0, len(half), size):
            rows = slice(start, start + size)
            self._add_pairs(_part(latents, rows), _part(true, rows), half[rows])

    def merge(self, other: Cofiring) -> None:
        """Add another's rows."""
        for name in ("both", "latent", "feature", "rows", "product"):
            getattr(self, name).add_(getattr(other, name))
        for name, sums in self.moments.items():
            sums += other.moments[name]

    def f1(self, half: int) -> Tensor:
        """Return 2 tp / (fires + wanted) of every pair, (m, n) float64; 0 where neither fires."""
        total = self.latent[half][:, None] + self.feature[half]
        return 2 * self.both[half].double() / total.clamp_min(1)

    def correlations(self) -> Tensor:
        """Return |Pearson correlation| of every latent's and feature's values, (m, n) float64.

        0 where one of the two does not vary.
        """
        n = self.rows.sum().clamp_min(1).double()
        z, z2, a, a2 = (self.moments[name] / n for name in ("z", "z2", "a", "a2"))
        covariance = self.product / n - z[:, None] * a
        deviations = _deviation(z, z2)[:, None] * _deviation(a, a2)
        return torch.where(deviations > 0, covariance / deviations, 0.0).abs().clamp_max(1)

    def _add_pairs(self, latents: Latents, true: Latents, half: Tensor) -> None:
        _, m, n = self.both.shape
        is_on = (latents.values != 0)[:, :, None] & (true.values != 0)[:, None]
        pair = (latents.indices[:, :, None] * n + true.indices[:, None])[is_on]
        product = (latents.values.double()[:, :, None] * true.values.double()[:, None])[is_on]
        offset = (half * (m * n))[:, None, None].expand_as(is_on)[is_on]
        ones = torch.ones_like(pair, dtype=torch.int32)
        self.both.view(-1).scatter_add_(0, pair + offset, ones)
        self.product.view(-1).scatter_add_(0, pair, product)


def _part(code: Latents, rows: slice) -> Latents:
    return Latents(code.values[rows], code.indices[rows])


def _deviation(mean: Tensor, square: Tensor) -> Tensor:
    """Return the standard deviation; 0 where it is no more than float64 rounding."""
    variance = square - mean * mean
    return torch.where(variance > 1e-12 * square, variance, 0.0).sqrt()
