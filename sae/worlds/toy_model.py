"""Toy models of superposition: sparse features squeezed through fewer hidden dimensions.

Source: Elhage et al., "Toy models of superposition", transformer-circuits.pub, 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BATCH = 256
LR = 3e-2
# Models trained side by side, of which the best is kept: a single one may end in a bad minimum.
RESTARTS = 8


@dataclass(frozen=True)
class ToyModel:
    """A trained model relu(Wᵀ W f + b): weight (m, n), bias (n), and the loss it reached."""

    weight: Tensor
    bias: Tensor
    loss: float


def train_toy_model(
    n_features: int,
    n_hidden: int,
    *,
    sparsity: float,
    importance: float,
    steps: int = 1000,
    seed: int = 0,
) -> ToyModel:
    """Return the best of several models of n_features in n_hidden dimensions, on the CPU.

    Features are 0 with probability `sparsity`, else uniform on [0, 1]. The loss is the mean over
    samples and features of importance^i (f_i − f̂_i)². Adam, its learning rate falling to 0.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(RESTARTS, n_hidden, n_features, generator=generator)
    weight = torch.nn.Parameter(start / n_features**0.5)
    bias = torch.nn.Parameter(torch.zeros(RESTARTS, 1, n_features))
    weights_of_loss = importance ** torch.arange(n_features, dtype=torch.float32)
    optimiser = torch.optim.Adam([weight, bias], lr=LR)

    def losses() -> Tensor:
        f = _features(BATCH, n_features, sparsity, generator)
        f_hat = torch.relu(f @ weight.mT @ weight + bias)
        return (weights_of_loss * (f - f_hat).square()).mean((1, 2))

    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LR * (1 - step / steps)
        optimiser.zero_grad()
        with torch.enable_grad():
            losses().sum().backward()
        optimiser.step()
    with torch.no_grad():
        reached = torch.stack([losses() for _ in range(50)]).mean(0)
    best = int(reached.argmin())
    return ToyModel(weight[best].detach(), bias[best, 0].detach(), float(reached[best]))


def feature_dimensionality(weight: Tensor) -> Tensor:
    """Return the share of a dimension that each feature has, (n), of columns `weight` (m, n).

    ‖W_i‖² / Σ_j (Ŵ_i · W_j)²: 1 for a feature by itself, 1/2 in an antipodal pair, 0 for none.
    """
    norms = weight.norm(dim=0)
    unit = weight / norms.clamp(min=1e-12)
    return norms.square() / (unit.T @ weight).square().sum(1).clamp(min=1e-12)


def _features(n: int, n_features: int, sparsity: float, generator: torch.Generator) -> Tensor:
    size = torch.rand(n, n_features, generator=generator)
    is_on = torch.rand(n, n_features, generator=generator) >= sparsity
    return size * is_on
