"""Drawing which features fire and how strongly, at a cost that follows what fires.

A dense draw needs a normal number for every feature of every row, of which a hundredth fires. Here
features in trees are looked at only below parents that fire, and rare features outside trees are
drawn by thinning: candidates come from a Poisson process that is dense enough for every row of the
block, and each is kept with the probability that its own row asks for. Both are exact: the outcome
has the distribution of the dense draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae.worlds.features import Features
from sae.worlds.forest import NONE, Forest

# Above this probability a dense draw is cheaper than thinning.
RARE = 0.05


@dataclass(frozen=True)
class Fired:
    """Which features fired: m places of rows and features, each once, with their magnitudes."""

    rows: Tensor
    features: Tensor
    values: Tensor


class Firing:
    """Draws for `features`, of which `forest` says who is whose child."""

    def __init__(self, features: Features, forest: Forest, scaled_by_parent: bool):
        self.features, self.forest, self.scaled_by_parent = features, forest, scaled_by_parent
        is_rare = features.probability[forest.top] <= RARE
        self.common, self.rare = forest.top[~is_rare], forest.top[is_rare]
        self.has_children = (forest.children != NONE).any(1)
        self.is_flat = not bool(self.has_children.any())
        self._common = (
            features.loading[self.common].T.contiguous(),
            features.threshold[self.common],
        )
        self._rare = (features.loading[self.rare].T.contiguous(), features.threshold[self.rare])

    def draw(self, n: int, generator: torch.Generator) -> Fired:
        """Return what fires in n rows, ordered by row."""
        device = self.features.loading.device
        rank = self.features.loading.shape[1]
        shared = torch.randn(n, rank, generator=generator, device=device)
        levels = [self._common_top(shared, generator), self._rare_top(shared, generator)]
        level = _joined(levels)
        found = [level]
        while not self.is_flat and len(level.rows):
            level = self._children(level, shared, generator)
            found.append(level)
        every = _joined(found)
        order = every.rows.argsort(stable=True)
        values = every.values * self.features.norm[every.features]
        return Fired(every.rows[order], every.features[order], values[order])

    def _common_top(self, shared: Tensor, generator: torch.Generator) -> Fired:
        loading, threshold = self._common
        noise = torch.randn(
            len(shared), len(threshold), generator=generator, device=threshold.device
        )
        rows, columns = (noise.addmm_(shared, loading) > threshold).nonzero().unbind(1)
        return self._strengths(rows, self.common[columns], generator)

    def _rare_top(self, shared: Tensor, generator: torch.Generator) -> Fired:
        """Thin a Poisson process: a cell that it hits at rate −log(1 − p) fires with probability p."""
        loading, threshold = self._rare
        n_rows, n_columns = len(shared), len(threshold)
        if n_columns == 0:
            nothing = self.rare
            return Fired(nothing, nothing, self.features.mean[nothing])
        level = torch.addmm(threshold, shared, loading, beta=-1)
        rate = -torch.special.log_ndtr(-level.amax(0))
        counts = torch.poisson(rate * n_rows, generator=generator).long()
        columns = torch.arange(n_columns, device=rate.device).repeat_interleave(counts)
        shape, device = columns.shape, rate.device
        rows = torch.randint(n_rows, shape, generator=generator, device=device)
        wanted = -torch.special.log_ndtr(-level[rows, columns])
        kept = torch.rand(shape, generator=generator, device=device) * rate[columns] < wanted
        cells = (rows[kept] * n_columns + columns[kept]).unique()
        return self._strengths(cells // n_columns, self.rare[cells % n_columns], generator)

    def _children(self, level: Fired, shared: Tensor, generator: torch.Generator) -> Fired:
        """Return which children of the features of one level fire."""
        is_parent = self.has_children[level.features]
        rows, parents = level.rows[is_parent], level.features[is_parent]
        scale = level.values[is_parent] / self.features.mean[parents]
        children = self.forest.children[parents]
        known = children.clamp(min=0)
        loading = self.features.loading[known]
        drive = torch.bmm(loading, shared[rows][:, :, None])[:, :, 0]
        noise = torch.randn(drive.shape, generator=generator, device=drive.device)
        is_on = (drive + noise > self.features.threshold[known]) & (children != NONE)
        strength = self._magnitudes(known, generator)
        is_on &= strength > 0
        # Of exclusive siblings that would fire, each is as likely to be the one that does.
        lot = torch.rand(drive.shape, generator=generator, device=drive.device)
        best = torch.where(is_on, lot, -1.0).argmax(1, keepdim=True)
        is_best = torch.zeros_like(is_on).scatter_(1, best, True)
        is_on &= is_best | ~self.forest.is_exclusive[parents][:, None]
        if self.scaled_by_parent:
            strength = strength * scale[:, None]
        places, columns = is_on.nonzero().unbind(1)
        return Fired(rows[places], children[places, columns], strength[places, columns])

    def _strengths(self, rows: Tensor, features: Tensor, generator: torch.Generator) -> Fired:
        values = self._magnitudes(features, generator)
        is_on = values > 0
        return Fired(rows[is_on], features[is_on], values[is_on])

    def _magnitudes(self, features: Tensor, generator: torch.Generator) -> Tensor:
        shape, device = features.shape, features.device
        if self.features.is_uniform:
            return torch.rand(shape, generator=generator, device=device)
        noise = torch.randn(shape, generator=generator, device=device)
        return torch.addcmul(
            self.features.mean[features], self.features.sd[features], noise
        ).relu_()


def _joined(parts: list[Fired]) -> Fired:
    return Fired(
        torch.cat([part.rows for part in parts]),
        torch.cat([part.features for part in parts]),
        torch.cat([part.values for part in parts]),
    )
