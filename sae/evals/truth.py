"""What the evals on a world are told: its features, and each row's true codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.evals.interface import EvalBatch
from sae.stream.contexts import CapturedContexts
from sae.worlds.seeds import evaluation_generator

if TYPE_CHECKING:
    from sae.evals.evaluable import Evaluable
    from sae.worlds.world import Sample, World

BLOCK_ROWS = 1024
FREQUENCY_ROWS = 16_384


@dataclass(frozen=True)
class Truth:
    """What is known of the world, and the dictionary's decoder.

    Attributes:
        directions: (n_features, d_in) unit rows. bias: (d_in).
        decoder: (d_sae, d_in), what each latent writes.
        frequent: (at most d_sae) int64, the features of the oracle.
        pairs: (p, 2) int64, parent and child; p may be 0.
    """

    directions: Tensor
    bias: Tensor
    decoder: Tensor
    frequent: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class TruthBatch(EvalBatch):
    """Rows of a world with their true codes (n, n_features); a document id is a row's number."""

    codes: Tensor


@dataclass(frozen=True)
class SampledContexts(CapturedContexts):
    """Samples of a world as contexts of one token, with their true codes (b, 1, n_features)."""

    codes: Tensor


def as_contexts(sample: Sample, first: int) -> SampledContexts:
    """Return samples as contexts of one token, documents numbered from `first`."""
    n, device = len(sample.x), sample.x.device
    numbers = torch.arange(first, first + n, device=device)[:, None]
    is_kept = torch.ones_like(numbers, dtype=torch.bool)
    return SampledContexts(
        torch.zeros_like(numbers), numbers, is_kept, sample.x[:, None], sample.codes[:, None]
    )


def truth_of(coder: Evaluable, world: World, pairs: Tensor | None = None) -> Truth:
    """Return what the ground truth's eval must know of `world` and of the dictionary."""
    return Truth(
        directions=world.directions.cpu(),
        bias=world.bias.cpu(),
        decoder=coder.directions().cpu(),
        frequent=frequent_features(world, coder.d_sae),
        pairs=family_pairs(world) if pairs is None else pairs,
    )


def frequent_features(world: World, n_wanted: int) -> Tensor:
    """Return the `n_wanted` features (or all) that fire most, (≤ n_wanted) int64, by rank.

    Counted on rows of their own, so that they are the same for all dictionaries of a width.
    """
    generator = evaluation_generator(-1, world.directions.device)
    counts = torch.zeros(world.n_features, dtype=torch.int64)
    for start in range(0, FREQUENCY_ROWS, BLOCK_ROWS):
        n = min(BLOCK_ROWS, FREQUENCY_ROWS - start)
        counts += (world.sample(n, generator).codes > 0).sum(0).cpu()
    return counts.argsort(descending=True, stable=True)[:n_wanted]


def family_pairs(world: Any) -> Tensor:
    """Return the world's parents and children as (p, 2) int64; p is 0 where it has no trees."""
    forest = getattr(getattr(world, "firing", None), "forest", None)
    if forest is None:
        return torch.zeros(0, 2, dtype=torch.int64)
    parent = forest.parent.cpu()
    children = (parent >= 0).nonzero()[:, 0]
    return torch.stack([parent[children], children], 1)
