"""Sums by block: what merging and resampling need, in memory that does not grow with the data.

The one idea: documents fall into at most N_BLOCKS blocks (document id modulo N_BLOCKS), and each
block keeps its own additive sums in float64. Merging adds block to block; a bootstrap over
documents (`bootstrap`) draws whole blocks. Up to some hundred documents a block is mostly one
document; beyond that it is a fixed random group of them, which widens the interval a little.

Sums about a mean are kept as (n, mean, M2), the sum of squares about the block's own mean, and
merged by Chan's rule, which loses no digits where the mean is large:
    M2 = M2_a + M2_b + ‖mean_b − mean_a‖² n_a n_b / (n_a + n_b).
Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing
sample variances".
"""

from __future__ import annotations

import torch
from torch import Tensor

N_BLOCKS = 512
ROUNDING = 1e-28
"""What is left of Σ‖x − mean‖² / Σ‖x‖² by float64 rounding where all x are equal."""


def block_of(document_ids: Tensor) -> Tensor:
    """Return the block of each document, (n) int64 in [0, N_BLOCKS)."""
    return document_ids.remainder(N_BLOCKS)


class BlockSums:
    """Named float64 sums by block.

    Attributes:
        sums: (n_blocks, len(names)) on the CPU.
    """

    def __init__(self, names: tuple[str, ...], n_blocks: int = N_BLOCKS) -> None:
        self.names = names
        self.sums = torch.zeros(n_blocks, len(names), dtype=torch.float64)

    def add(self, blocks: Tensor, values: dict[str, Tensor]) -> None:
        """Add to each token's block its values, (n) for every name."""
        rows = torch.stack([values[name].double() for name in self.names], dim=-1)
        batch = torch.zeros(self.sums.shape, dtype=torch.float64, device=rows.device)
        self.sums += batch.index_add_(0, blocks.to(rows.device), rows).cpu()

    def merge(self, other: BlockSums) -> None:
        """Add another's sums."""
        self.sums += other.sums

    def __getitem__(self, name: str) -> Tensor:
        """Return one name's sums, (n_blocks)."""
        return self.sums[:, self.names.index(name)]

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        """Return Σ_block weight · sum for each name, (r), from weights (r, n_blocks)."""
        return dict(zip(self.names, (weights @ self.sums).unbind(-1), strict=True))


class BlockVariance:
    """Count, mean and squared deviation of vectors by block, in float64.

    Attributes:
        n: (n_blocks) tokens. mean: (n_blocks, d). m2: (n_blocks), Σ‖x − mean of the block‖².
    """

    def __init__(self, d: int, n_blocks: int = N_BLOCKS) -> None:
        self.n = torch.zeros(n_blocks, dtype=torch.float64)
        self.mean = torch.zeros(n_blocks, d, dtype=torch.float64)
        self.m2 = torch.zeros(n_blocks, dtype=torch.float64)

    def add(self, blocks: Tensor, x: Tensor) -> None:
        """Add the vectors x (n, d) to their blocks (n)."""
        x = x.double()
        present, row = blocks.to(x.device).unique(return_inverse=True)
        n = torch.bincount(row, minlength=len(present)).double()
        mean = x.new_zeros(len(present), x.shape[1]).index_add_(0, row, x) / n[:, None]
        deviation = (x - mean[row]).pow(2).sum(1)
        m2 = x.new_zeros(len(present)).index_add_(0, row, deviation)
        self._merge_rows(present.cpu(), n.cpu(), mean.cpu(), m2.cpu())

    def merge(self, other: BlockVariance) -> None:
        """Add another's vectors, block by block."""
        self._merge_rows(torch.arange(len(self.n)), other.n, other.mean, other.m2)

    def total_mean(self) -> Tensor:
        """Return the mean over all blocks, (d); zeros where nothing was added."""
        return self.n @ self.mean / self.n.sum().clamp_min(1)

    def squares_about(self, centre: Tensor) -> Tensor:
        """Return Σ‖x − centre‖² by block, (n_blocks)."""
        return self.m2 + self.n * (self.mean - centre).pow(2).sum(1)

    def weighted_squares(self, weights: Tensor) -> Tensor:
        """Return Σ‖x − mean‖² of each weighted set of blocks about that set's own mean, (r).

        0 where it is no more than float64 rounding.

        Shapes: weights (r, n_blocks). Moved to the overall mean first, so that no digits cancel.
        """
        centre = self.total_mean()
        moved = weights @ (self.n[:, None] * (self.mean - centre))
        n = (weights @ self.n).clamp_min(1)
        squares = weights @ self.squares_about(centre) - moved.pow(2).sum(1) / n
        rounding = ROUNDING * (weights @ self.squares_about(torch.zeros_like(centre)))
        return torch.where(squares > rounding, squares, 0.0)

    def _merge_rows(self, rows: Tensor, n: Tensor, mean: Tensor, m2: Tensor) -> None:
        share = n / (self.n[rows] + n).clamp_min(1)
        step = mean - self.mean[rows]
        self.m2[rows] += m2 + step.pow(2).sum(1) * self.n[rows] * share
        self.mean[rows] += step * share[:, None]
        self.n[rows] += n
