"""A world: directions, a bias, and the law by which features fire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.config import WorldConfig
from sae.worlds.firing import Fired, Firing
from sae.worlds.seeds import training_generator

# Rows drawn at once. On a CPU they fit into its cache; a GPU is given enough to do.
BLOCK_ROWS = {"cpu": 1024}
BLOCK_ROWS_ELSEWHERE = 16_384


@dataclass(frozen=True)
class Sample:
    """Activations x (n, d_in) and the true codes (n, n_features) ≥ 0, both float32."""

    x: Tensor
    codes: Tensor


class World:
    """Activations x = codes @ directions + bias, with known codes and directions.

    directions: (n_features, d_in) unit rows. bias: (d_in). `cfg` says how it was made, every field
    that applies filled in.
    """

    def __init__(self, cfg: WorldConfig, directions: Tensor, bias: Tensor, firing: Firing):
        self.cfg, self.directions, self.bias, self.firing = cfg, directions, bias, firing
        self.n_features, self.d_in = directions.shape
        self.device = directions.device

    @property
    def block_rows(self) -> int:
        """Rows that are drawn at once for training."""
        return BLOCK_ROWS.get(self.device.type, BLOCK_ROWS_ELSEWHERE)

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """Return n independent samples, drawn with a generator of the world's device.

        For measuring, take `evaluation_generator`'s: training never draws its rows.
        """
        fired = self.firing.draw(n, generator)
        codes = self.directions.new_zeros(n, self.n_features)
        codes[fired.rows, fired.features] = fired.values
        return Sample(self._activations(n, fired), codes)

    def activations(self, n: int, generator: torch.Generator) -> Tensor:
        """Return x (n, d_in) of `sample` without making its codes."""
        return self._activations(n, self.firing.draw(n, generator))

    def training_block(self, seed: int, block: int, *, lane: int = 0, n_lanes: int = 1) -> Tensor:
        """Return a block of training rows (block_rows, d_in): a function of its arguments alone."""
        generator = training_generator(seed, lane, block, n_lanes, self.device)
        return self.activations(self.block_rows, generator)

    def batches(self, n: int, *, seed: int = 0) -> Iterator[Tensor]:
        """Yield batches (n, d_in) of training rows for ever, such as `sae.fit` takes."""
        pending = self.directions.new_zeros(0, self.d_in)
        block = 0
        while True:
            while len(pending) < n:
                pending = torch.cat([pending, self.training_block(seed, block)])
                block += 1
            yield pending[:n]
            pending = pending[n:]

    def _activations(self, n: int, fired: Fired) -> Tensor:
        starts = torch.searchsorted(fired.rows, torch.arange(n, device=self.device))
        x = torch.nn.functional.embedding_bag(
            fired.features,
            self.directions,
            starts,
            mode="sum",
            per_sample_weights=fired.values,
        )
        return x.add_(self.bias)
