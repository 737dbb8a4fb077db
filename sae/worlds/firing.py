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

    def at(self, places: Tensor) -> Fired:
        """Return some of the m, by index."""
        return Fired(
            self.rows.index_select(0, places),
            self.features.index_select(0, places),
            self.values.index_select(0, places),
        )


class Firing:
    """Draws for `features`, of which `forest` says who is whose child."""

    def __init__(self, features: Features, forest: Forest, scaled_by_parent: bool):
        self.features, self.forest, self.scaled_by_parent = features, forest, scaled_by_parent
        is_rare = features.probability[forest.top] <= RARE
        self._common = _Group(features, forest.top[~is_rare])
        self._rare = _Group(features, forest.top[is_rare])
        self._families = _Families(features, forest)

    def draw(self, n: int, generator: torch.Generator) -> Fired:
        """Return what fires in n rows, ordered by row."""
        loading = self.features.loading
        shared = torch.randn(n, loading.shape[1], generator=generator, device=loading.device)
        level = _joined([self._common_top(shared, generator), self._rare_top(shared, generator)])
        found = [level]
        for _ in range(self._families.n_levels):
            level = self._children(level, shared, generator)
            found.append(level)
        every = _joined(found)
        every = every.at(every.rows.argsort(stable=True))
        norms = self.features.norm.index_select(0, every.features)
        return Fired(every.rows, every.features, every.values * norms)

    def _common_top(self, shared: Tensor, generator: torch.Generator) -> Fired:
        group = self._common
        shape, device = (len(shared), len(group.threshold)), shared.device
        noise = torch.randn(shape, generator=generator, device=device)
        is_on = noise.addmm_(shared, group.loading) > group.threshold
        rows, columns = is_on.nonzero().unbind(1)
        return self._strengths(rows, group.features.index_select(0, columns), generator)

    def _rare_top(self, shared: Tensor, generator: torch.Generator) -> Fired:
        """Thin a Poisson process: a cell hit at rate −log(1 − p) fires with probability p."""
        group, n_rows, device = self._rare, len(shared), shared.device
        n_columns = len(group.threshold)
        if n_columns == 0:
            nothing = group.features
            return Fired(nothing, nothing, self.features.mean[nothing])
        level = torch.addmm(group.threshold, shared, group.loading, beta=-1)
        rate = _rate(level.amax(0))
        counts = torch.poisson(rate * n_rows, generator=generator).long()
        columns = torch.arange(n_columns, device=device).repeat_interleave(counts)
        shape = columns.shape
        cells = torch.randint(n_rows, shape, generator=generator, device=device) * n_columns
        cells += columns
        height = torch.rand(shape, generator=generator, device=device)
        height *= rate.index_select(0, columns)
        is_kept = height < _rate(level.view(-1).index_select(0, cells))
        cells = cells.masked_select(is_kept).unique()
        columns = cells % n_columns
        return self._strengths(
            cells // n_columns, group.features.index_select(0, columns), generator
        )

    def _children(self, level: Fired, shared: Tensor, generator: torch.Generator) -> Fired:
        """Return which children of the features of one level fire."""
        families = self._families
        of_parent = families.number.index_select(0, level.features)
        level = level.at((of_parent >= 0).nonzero()[:, 0])
        family = families.number.index_select(0, level.features)
        own = shared.index_select(0, level.rows)[:, :, None]
        drive = torch.bmm(families.loading.index_select(0, family), own)[:, :, 0]
        drive -= families.threshold.index_select(0, family)
        shape, device = drive.shape, drive.device
        is_on = drive + torch.randn(shape, generator=generator, device=device) > 0
        strength = self._magnitudes(
            families.mean.index_select(0, family), families.sd.index_select(0, family), generator
        )
        is_on &= strength > 0
        # Of exclusive siblings that would fire, each is as likely to be the one that does.
        lot = torch.rand(shape, generator=generator, device=device).masked_fill_(~is_on, -1.0)
        is_best = lot == lot.amax(1, keepdim=True)
        is_on &= is_best | families.is_shared.index_select(0, family)
        if self.scaled_by_parent:
            means = self.features.mean.index_select(0, level.features)
            strength *= (level.values / means)[:, None]
        places = is_on.view(-1).nonzero()[:, 0]
        parents = places // shape[1]
        children = families.children.index_select(0, family).view(-1)
        return Fired(
            level.rows.index_select(0, parents),
            children.index_select(0, places),
            strength.view(-1).index_select(0, places),
        )

    def _strengths(self, rows: Tensor, features: Tensor, generator: torch.Generator) -> Fired:
        mean = self.features.mean.index_select(0, features)
        sd = self.features.sd.index_select(0, features)
        fired = Fired(rows, features, self._magnitudes(mean, sd, generator))
        return fired.at((fired.values > 0).nonzero()[:, 0])

    def _magnitudes(self, mean: Tensor, sd: Tensor, generator: torch.Generator) -> Tensor:
        if self.features.is_uniform:
            return torch.rand(mean.shape, generator=generator, device=mean.device)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return torch.addcmul(mean, sd, noise).relu_()


class _Group:
    """Some features, with what their firing needs laid out for a product: (rank, m), (m)."""

    def __init__(self, features: Features, members: Tensor):
        self.features = members
        self.loading = features.loading[members].T.contiguous()
        self.threshold = features.threshold[members]


class _Families:
    """Each parent's children side by side: (n_parents, branching) and (…, branching, rank).

    Where a parent has fewer children, the place is held by one that never fires. number:
    (n_features) a feature's row in these tables, −1 without children. is_shared: (n_parents, 1)
    whether siblings may fire together.
    """

    def __init__(self, features: Features, forest: Forest):
        parents = (forest.children != NONE).any(1).nonzero()[:, 0]
        self.children = forest.children[parents]
        self.number = torch.full_like(forest.parent, NONE)
        self.number[parents] = torch.arange(len(parents), device=parents.device)
        known = self.children.clamp(min=0)
        self.loading = features.loading[known]
        never = self.children == NONE
        self.threshold = features.threshold[known].masked_fill_(never, float("inf"))
        self.mean, self.sd = features.mean[known], features.sd[known]
        self.is_shared = ~forest.is_exclusive[parents][:, None]
        self.n_levels = forest.n_levels


def _rate(level: Tensor) -> Tensor:
    """Return −log(1 − Φ(level)) ≥ 0, for levels well below where Φ is 1 in float32."""
    # By erfc, since torch's own Φ loses the small probabilities that matter here.
    return torch.log1p(torch.erfc(level * -(0.5**0.5)).mul_(-0.5)).neg_()


def _joined(parts: list[Fired]) -> Fired:
    return Fired(
        torch.cat([part.rows for part in parts]),
        torch.cat([part.features for part in parts]),
        torch.cat([part.values for part in parts]),
    )
