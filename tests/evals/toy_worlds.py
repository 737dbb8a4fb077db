"""A small world without the library's: what `evaluate_on_world` needs, and dictionaries on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae.worlds import Sample


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class ToyWorld:
    """Independent features, feature j firing at a rate that falls in j; or parents and children.

    With `is_tree` features 0 and 1 are parents of 2, 3 and 4, 5.
    """

    n_features: int = 24
    d_in: int = 16
    is_tree: bool = False
    directions: Tensor = field(init=False)
    bias: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.directions = unit(gaussian(self.n_features, self.d_in, seed=1))
        self.bias = 0.3 * gaussian(self.d_in, seed=2)

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        rates = torch.linspace(0.3, 0.03, self.n_features)
        fires = torch.rand(n, self.n_features, generator=generator) < rates
        if self.is_tree:
            fires[:, 2:6] &= fires[:, [0, 0, 1, 1]]
        sizes = 1 + torch.rand(n, self.n_features, generator=generator)
        codes = torch.where(fires, sizes, 0.0)
        return Sample(codes @ self.directions + self.bias, codes)


@dataclass
class Linear:
    """The k largest of W (x − b), decoded by D; a plain object."""

    world: ToyWorld
    encoder: Tensor
    W_dec: Tensor
    k: int = 4

    def encode(self, x: Tensor) -> Tensor:
        scores = (x - self.world.bias) @ self.encoder.T
        values, indices = torch.topk(scores, self.k)
        return torch.zeros_like(scores).scatter(1, indices, values.clamp_min(0))

    def decode(self, dense: Tensor) -> Tensor:
        return dense @ self.W_dec + self.world.bias
