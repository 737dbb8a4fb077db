"""Small worlds, and what is measured on their codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae.config import WorldConfig
from sae.worlds import World, evaluation_generator, make_world

# 4 trees of 1 + 3 + 9 features, whose last level is cut short, and 12 features outside.
SMALL: dict[str, Any] = {
    "name": "synth_1k",
    "n_features": 64,
    "d_in": 24,
    "trees": 4,
    "branching": 3,
    "depth": 2,
    "rarest": 0.02,
    "commonest": 0.5,
}


def small_config(**settings: Any) -> WorldConfig:
    without = ("rarest", "commonest") if "probabilities" in settings else ()
    base = {name: value for name, value in SMALL.items() if name not in without}
    return WorldConfig(**(base | settings))


def small(**settings: Any) -> World:
    return make_world(small_config(**settings))


def codes_of(world: World, n: int = 20_000, seed: int = 0) -> Tensor:
    return world.sample(n, evaluation_generator(seed)).codes


def rates(codes: Tensor) -> Tensor:
    return (codes > 0).double().mean(0)


def firing_correlation(codes: Tensor) -> Tensor:
    """Return correlations (n_features, n_features) of what fires, 0 on the diagonal."""
    matrix = torch.corrcoef((codes > 0).double().T).nan_to_num()
    return matrix - torch.diag(matrix.diag())


def deviations(found: Tensor, wanted: Tensor, n: int) -> Tensor:
    """Return differences of shares of n rows in their standard errors."""
    error = (wanted * (1 - wanted) / n).clamp(min=1e-9).sqrt()
    return (found - wanted) / error
