"""How alike are the items on which a latent fires? All pairs at once, from sums of one pass.

With unit embeddings e_i of n items, their mean μ, c_i = e_i − μ, V = mean ‖c‖², and activations
a_i ≥ 0 of a latent, its score is the weighted mean of c_i·c_j over all pairs of two items,
    MS = Σ_{i≠j} a_i a_j c_i·c_j / (V Σ_{i≠j} a_i a_j)
       = (‖S − s μ‖² − D) / (V (s² − s₂)),   D = Σ a²‖c‖² = q − 2 μ·R + s₂ ‖μ‖²
    S = Σ a e,  R = Σ a² e,  s = Σ a,  s₂ = Σ a²,  q = Σ a² ‖e‖²
so the mean is subtracted at the end and one pass is enough. An activation's scale cancels: dividing
by the latent's maximum, as min-max scaling does where the least is 0, changes nothing.
0: as alike as any two items; 1: as alike as an item is to itself, in the mean over items. Codes put
on other items at random have the expectation −1 / (n − 1), whatever they are: Σ c = 0.

Items fall into two halves by document, and S and s are kept for each. Pairs across halves are of
two documents, with no item paired with itself:
    MS_across = (S_0 − s_0 μ)·(S_1 − s_1 μ) / (V s_0 s_1).

Source: Pach et al. 2025, "Sparse Autoencoders Learn Monosemantic Features in Vision-Language
Models" (arXiv 2504.02821); deviations: centred, scaled by V, signed codes by |a|.
Cost: 2 · firings · width multiplications; memory 24 · width + 48 bytes a latent, float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HALVES = 2
LATENTS_AT_ONCE = 4096
ROUNDING = 1e-12


class ItemFirings(NamedTuple):
    """Which latents fire on which items of a batch, and how strongly; (p) each, values ≥ 0."""

    latents: Tensor
    items: Tensor
    values: Tensor


class PairSums:
    """The running sums; they move to the device of what is added.

    Attributes:
        n: items seen. counts: (m) int64, items on which each latent fires.
    """

    def __init__(self, n_latents: int, width: int) -> None:
        self.n, self.width = 0, width
        self.counts = torch.zeros(n_latents, dtype=torch.int64)
        zeros = {
            **{"items": (width,), "norms": ()},
            **{"weighted": (HALVES, n_latents, width), "squared": (n_latents, width)},
            **{"total": (HALVES, n_latents), "total_squared": (n_latents,), "q": (n_latents,)},
        }
        self._sums = {k: torch.zeros(shape, dtype=torch.float64) for k, shape in zeros.items()}

    def add(self, embeddings: Tensor, halves: Tensor, firings: ItemFirings) -> None:
        """Add n items: embeddings (n, width), halves (n) 0 or 1, and what fires on them."""
        e, sums = embeddings.double(), self._on(embeddings.device)
        latents, items = firings.latents, firings.items
        a = firings.values.double()
        m, n = len(self.counts), len(e)
        by_half = halves[items] * m + latents
        self.n += n
        self.counts += torch.bincount(latents, minlength=m)
        sums["items"] += e.sum(0)
        sums["norms"] += e.pow(2).sum()
        sums["weighted"].view(HALVES * m, -1).addmm_(_sparse(by_half, items, a, HALVES * m, n), e)
        sums["squared"].addmm_(_sparse(latents, items, a * a, m, n), e)
        sums["total"].view(-1).index_add_(0, by_half, a)
        sums["total_squared"].index_add_(0, latents, a * a)
        sums["q"].index_add_(0, latents, a * a * e.pow(2).sum(1)[items])

    def merge(self, other: PairSums) -> None:
        """Add another's items."""
        sums = self._on(other.counts.device)
        self.n += other.n
        self.counts += other.counts
        for name, theirs in other._sums.items():
            sums[name] += theirs

    @property
    def shuffled(self) -> float:
        """The score's expectation where codes are put on items at random; NaN below two items."""
        return -1 / (self.n - 1) if self.n > 1 else torch.nan

    def scores(self) -> tuple[Tensor, Tensor]:
        """Return MS and MS_across of each latent, (m) float64 on the CPU; NaN where undefined.

        MS is undefined for latents that fire on fewer than two items, MS_across for those that
        fire in one half only, both where all embeddings are equal.
        """
        mean = self._sums["items"] / max(self.n, 1)
        spread = self._sums["norms"] / max(self.n, 1) - mean @ mean
        if spread <= ROUNDING:
            none = torch.full((len(self.counts),), torch.nan, dtype=torch.float64)
            return none, none.clone()
        starts = range(0, len(self.counts), LATENTS_AT_ONCE)
        parts = [self._scores(slice(i, i + LATENTS_AT_ONCE), mean, spread) for i in starts]
        within, across = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return within, across

    def _scores(self, rows: slice, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        sums = self._sums
        total, squared = sums["total"][:, rows], sums["total_squared"][rows]
        centred = sums["weighted"][:, rows] - total[:, :, None] * mean
        alone = sums["q"][rows] - 2 * sums["squared"][rows] @ mean + squared * (mean @ mean)
        s = total.sum(0)
        pairs = (centred.sum(0).pow(2).sum(1) - alone) / (s * s - squared) / spread
        across = (centred[0] * centred[1]).sum(1) / total.prod(0) / spread
        has_pair = (self.counts[rows] > 1) & (s * s - squared > ROUNDING * s * s)
        return (
            pairs.where(has_pair, torch.nan),
            across.where((total > 0).all(0), torch.nan),
        )

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if self.counts.device != device:
            self.counts = self.counts.to(device)
            self._sums = {name: part.to(device) for name, part in self._sums.items()}
        return self._sums


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, m: int, n: int) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.stack([rows, columns]), values, (m, n), check_invariants=False
    )
