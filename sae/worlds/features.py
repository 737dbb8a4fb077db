"""How often features fire, how strongly, and together with which others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A feature keeps at least this variance of its own beside what it shares with the others.
MIN_OWN_VARIANCE = 0.01


@dataclass(frozen=True)
class Features:
    """What every feature does when nothing above it forbids; all (n_features) but `loading`.

    Feature i fires where ε·loading_i + η_i > threshold_i, with ε (rank) and η_i independent
    standard normals: a Gaussian copula, divided by the standard deviation of the own part η_i. Its
    magnitude is then relu(N(mean_i, sd_i²)), or uniform on [0, 1], and `norm` times that its code.
    """

    probability: Tensor
    loading: Tensor
    threshold: Tensor
    mean: Tensor
    sd: Tensor
    norm: Tensor
    is_uniform: bool = False

    def to(self, device: torch.device | str) -> Features:
        """Return the same features on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def zipf(n_features: int, *, exponent: float, rarest: float, commonest: float) -> Tensor:
    """Return probabilities (n_features) ∝ rank^(−exponent), rescaled to [rarest, commonest]."""
    if n_features == 1:
        return torch.tensor([commonest])
    law = torch.arange(1, n_features + 1, dtype=torch.float64) ** -exponent
    share = (law - law[-1]) / (law[0] - law[-1])
    return (rarest + (commonest - rarest) * share).float()


def draw_factor(n_features: int, rank: int, scale: float, generator: torch.Generator) -> Tensor:
    """Return the factor (n_features, rank) whose rows' inner products are latent correlations.

    Rows that would leave less than MIN_OWN_VARIANCE to the feature itself are shortened.
    """
    factor = torch.randn(n_features, rank, generator=generator) * scale
    squares = factor.square().sum(1, keepdim=True)
    limit = 1 - MIN_OWN_VARIANCE
    return torch.where(squares > limit, factor * (limit / squares.clamp(min=1e-30)).sqrt(), factor)


def make_features(
    probability: Tensor,
    *,
    factor: Tensor,
    mean: Tensor,
    sd: Tensor,
    norm: Tensor | None = None,
    is_uniform: bool = False,
) -> Features:
    """Return features that fire with `probability` (n_features), correlated by `factor`."""
    own = (1 - factor.double().square().sum(1)).sqrt()
    quantile = -torch.special.ndtri(probability.double())
    return Features(
        probability=probability.float(),
        loading=(factor / own[:, None]).float(),
        threshold=(quantile / own).float(),
        mean=mean.float(),
        sd=sd.float(),
        norm=torch.ones(len(mean)) if norm is None else norm.float(),
        is_uniform=is_uniform,
    )
