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

# A feature is thinned where rows this many standard deviations out still fire with Φ(−1/4) at most;
# else candidates are so many that a dense draw is cheaper.
FAR_OUT, RARE_BELOW = 3.5, -0.25
# Levels at which a feature fires in all but 3 of ten million rows count as this one, whose rate is
# finite in float32.
HIGHEST = 5.0


@dataclass(frozen=True)
class Fired:
    """Which features fired: m places of rows and features, each once, and how strongly."""

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
        furthest = FAR_OUT * features.loading.norm(dim=1) - features.threshold
        is_rare = furthest[forest.top] <= RARE_BELOW
        self._common = _Group(features, forest.top[~is_rare])
        self._rare = _Group(features, forest.top[is_rare])
        self._families = _Families(features, forest)

    def draw(self, n: int, generator: torch.Generator) -> Fired:
        """Return what fires in n rows, ordered by row."""
        loading = self.features.loading
        shared = torch.randn(n, loading.shape[1], generator=generator, device=loading.device)
        top = [self._common_top(shared, generator), self._rare_top(shared, generator)]
        found = [merged(top, n)]
        for _ in range(self._families.n_levels):
            found.append(self._children(found[-1], shared, generator))
        every = merged(found, n)
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
        drive = shared @ group.loading
        rate = _rate(drive.amax(0) - group.threshold)
        counts = torch.poisson(rate * n_rows, generator=generator).long()
        columns = torch.arange(n_columns, device=device).repeat_interleave(counts)
        shape = columns.shape
        cells = torch.randint(n_rows, shape, generator=generator, device=device)
        cells = torch.add(columns, cells, alpha=n_columns)
        height = torch.rand(shape, generator=generator, device=device)
        height *= rate.index_select(0, columns)
        level = drive.view(-1).index_select(0, cells)
        level -= group.threshold.index_select(0, columns)
        cells = cells.masked_select(height < _rate(level)).unique()
        rows, columns = cells // n_columns, cells % n_columns
        return self._strengths(rows, group.features.index_select(0, columns), generator)

    def _children(self, level: Fired, shared: Tensor, generator: torch.Generator) -> Fired:
        """Return which children of the features of one level fire, in the order of their parents.

        Of exclusive siblings that would fire, each is as likely to be the one that does.
        """
        families = self._families
        family = families.number.index_select(0, level.features)
        is_parent = (family >= 0).nonzero()[:, 0]
        level, family = level.at(is_parent), family.index_select(0, is_parent)
        own = shared.index_select(0, level.rows)[:, :, None]
        loading, threshold, mean, sd = families.of(family)
        drive = torch.bmm(loading, own)[:, :, 0]
        shape, device = drive.shape, drive.device
        drive += torch.randn(shape, generator=generator, device=device)
        strength = self._magnitudes(mean, sd, generator)
        is_on = (drive > threshold) & (strength > 0)
        lot = torch.rand(shape, generator=generator, device=device).masked_fill_(~is_on, -1.0)
        is_best = families.places == lot.argmax(1, keepdim=True)
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
    """Each parent's children side by side, (n_parents, branching) of everything that they need.

    Where a parent has fewer children, the place is held by one that never fires. number:
    (n_features) a feature's row in these tables, −1 without children. is_shared: (n_parents, 1)
    whether siblings may fire together.
    """

    def __init__(self, features: Features, forest: Forest):
        parents = (forest.children != NONE).any(1).nonzero()[:, 0]
        self.children = forest.children[parents]
        self.number = torch.full_like(forest.parent, NONE)
        self.number[parents] = torch.arange(len(parents), device=parents.device)
        self.is_shared = ~forest.is_exclusive[parents][:, None]
        self.n_levels = forest.n_levels
        self.places = torch.arange(self.children.shape[1], device=parents.device)
        known = self.children.clamp(min=0)
        never = self.children == NONE
        parts = (
            features.loading[known].flatten(1),
            features.threshold[known].masked_fill_(never, float("inf")),
            features.mean[known],
            features.sd[known],
        )
        self._widths = [part.shape[1] for part in parts]
        self._table = torch.cat(parts, 1)

    def of(self, family: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return loading (m, branching, rank), threshold, mean and sd (m, branching) of m rows."""
        parts = self._table.index_select(0, family).split(self._widths, 1)
        loading, threshold, mean, sd = parts
        return loading.unflatten(1, (len(self.places), -1)), threshold, mean, sd


def _rate(level: Tensor) -> Tensor:
    """Return −log(1 − Φ(level)), levels above HIGHEST counting as it."""
    # By erfc, since torch's own Φ loses the small probabilities that matter here.
    scaled = level.clamp(max=HIGHEST).mul_(-(0.5**0.5))
    return torch.log1p(torch.erfc(scaled).mul_(-0.5)).neg_()


def merged(parts: list[Fired], n_rows: int) -> Fired:
    """Return parts that are each ordered by row as one that is.

    Counting tells where everything goes, which costs a third of sorting.
    """
    parts = [part for part in parts if len(part.rows)] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    n = len(parts)
    keys = torch.cat([part.rows * n + i for i, part in enumerate(parts)])
    counts = keys.bincount(minlength=n_rows * n)
    before = counts.cumsum(0) - counts
    by_part = counts.view(n_rows, n).T
    given = (by_part.flatten().cumsum(0).view(n, n_rows) - by_part).T.flatten()
    place = torch.arange(len(keys), device=keys.device)
    place += (before - given).index_select(0, keys)
    columns = (
        torch.cat([part.rows for part in parts]),
        torch.cat([part.features for part in parts]),
        torch.cat([part.values for part in parts]),
    )
    return Fired(*(torch.empty_like(c).scatter_(0, place, c) for c in columns))
