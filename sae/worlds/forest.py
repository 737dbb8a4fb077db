"""Which features are whose children, and what that does to their probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1


@dataclass(frozen=True)
class Forest:
    """Trees over features.

    parent: (n_features) a feature's parent, or −1. children: (n_features, branching), −1 where
    there is none. is_exclusive: (n_features) whether at most one of a feature's children fires.
    """

    parent: Tensor
    children: Tensor
    is_exclusive: Tensor

    @property
    def top(self) -> Tensor:
        """Features without a parent: roots, and those outside any tree."""
        return (self.parent == NONE).nonzero()[:, 0]

    @property
    def n_levels(self) -> int:
        """Levels below the roots."""
        n, level = 0, self.parent
        while (level := level[level != NONE]).numel():
            n, level = n + 1, self.parent[level]
        return n

    def to(self, device: torch.device | str) -> Forest:
        """Return the same forest on a device."""
        return Forest(
            self.parent.to(device), self.children.to(device), self.is_exclusive.to(device)
        )


def grow_forest(
    n_features: int,
    *,
    trees: int,
    branching: int,
    depth: int,
    exclusive_share: float,
    generator: torch.Generator,
) -> Forest:
    """Return `trees` complete trees, numbered breadth first over all of them at once.

    Common features are then parents of rarer ones. Features that the trees do not need stay
    outside; where there are too few, the last level is cut short. `exclusive_share` of the parents
    with two children or more, drawn with `generator`, have exclusive ones.
    """
    parent = torch.full((n_features,), NONE)
    children = torch.full((n_features, max(branching, 1)), NONE)
    level = torch.arange(min(trees, n_features))
    n_used = len(level)
    for _ in range(depth):
        born = torch.arange(n_used, min(n_used + len(level) * branching, n_features))
        of = torch.arange(len(born)) // branching
        parent[born] = level[of]
        children[level[of], torch.arange(len(born)) % branching] = born
        level, n_used = born, n_used + len(born)
    eligible = ((children != NONE).sum(1) >= 2).nonzero()[:, 0]
    chosen = torch.randperm(len(eligible), generator=generator)
    is_exclusive = torch.zeros(n_features, dtype=torch.bool)
    is_exclusive[eligible[chosen[: int(len(eligible) * exclusive_share)]]] = True
    return Forest(parent, children, is_exclusive)


def compensated(probabilities: Tensor, forest: Forest) -> Tensor:
    """Return probabilities given that the parent fires, at which features fire about as often as
    `probabilities` (n_features) says.

    A child's is divided by its parent's; among exclusive siblings it is also raised by the number
    of others that want to fire at once, 1 + Σ p_other / p_parent. It is at most 1.
    """
    p = probabilities.double()
    has_parent = forest.parent != NONE
    of_parent = torch.where(has_parent, p[forest.parent.clamp(min=0)], 1.0)
    kin = torch.where(forest.children == NONE, 0.0, p[forest.children.clamp(min=0)]).sum(1)
    shared = torch.where(forest.is_exclusive, kin, 0.0)[forest.parent.clamp(min=0)]
    competing = torch.where(has_parent & (shared > 0), (shared - p).clamp(min=0), 0.0)
    raised = p / of_parent.clamp(min=1e-30) * (1 + competing / of_parent.clamp(min=1e-30))
    return torch.where(has_parent, raised, p).clamp(max=1.0)
