"""What every measure on a world must rank: the truth above, the nulls below.

truth > trained > frozen random decoder ≥ random directions > codes shuffled in time
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.coder.latents import Latents

if TYPE_CHECKING:
    from sae.worlds.world import World


class TrueDictionary:
    """The true directions of some features, with their true codes.

    Codes do not follow from x: `evaluate_on_world` shows them before each batch.

    Args:
        features: (m) int64, which features; see `frequent_features`.
    """

    def __init__(self, world: World, features: Tensor) -> None:
        self.features = features.to(world.directions.device)
        self.W_dec, self.b_dec = world.directions[self.features], world.bias
        self.d_sae, self.d_in = self.W_dec.shape
        self._given = self.W_dec.new_zeros(0, world.n_features)

    def see(self, codes: Tensor) -> None:
        """Take the true codes (n, n_features) of the rows that are evaluated next."""
        self._given = codes

    def encode(self, x: Tensor) -> Tensor:
        """Return the true codes (n, m) of the rows that are being evaluated.

        Errors: RuntimeError where the codes seen last are not of as many rows as x.
        """
        if len(self._given) != len(x):
            raise RuntimeError(
                f"true codes must be given for the {len(x)} rows; they are for {len(self._given)}."
            )
        return self._given[:, self.features]

    def decode(self, dense: Tensor) -> Tensor:
        """Return x_hat (n, d_in)."""
        return dense @ self.W_dec + self.b_dec


class RandomDirections:
    """Random unit directions, each token written with the k that point along it most.

    Args:
        b_dec: (d_in), taken from x before and added after.
    """

    def __init__(self, b_dec: Tensor, d_sae: int, k: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(d_sae, len(b_dec), generator=generator)
        self.W_dec = (rows / rows.norm(dim=1, keepdim=True)).to(b_dec.device)
        self.b_dec, self.k = b_dec, k
        self.d_sae, self.d_in = self.W_dec.shape

    def encode_sparse(self, x: Tensor) -> Latents:
        """Return the k largest projections of each token, none below 0."""
        values, indices = torch.topk((x - self.b_dec) @ self.W_dec.T, self.k)
        return Latents(values.clamp_min(0), indices)

    def decode(self, latents: Latents) -> Tensor:
        """Return x_hat (n, d_in)."""
        return latents.to_dense(self.d_sae) @ self.W_dec + self.b_dec


class ShuffledCodes:
    """A dictionary that gives each token the code of another one: half a batch further on."""

    def __init__(self, coder: Any, d_sae: int) -> None:
        self.coder, self.W_dec = coder, coder.W_dec
        self.d_sae, self.d_in = d_sae, coder.W_dec.shape[1]

    def see(self, codes: Tensor) -> None:
        """Pass true codes on to a dictionary that takes them."""
        if hasattr(self.coder, "see"):
            self.coder.see(codes)

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense code (n, d_sae)."""
        return self.coder.encode(x).roll(max(len(x) // 2, 1), 0)

    def decode(self, dense: Tensor) -> Tensor:
        """Return x_hat (n, d_in)."""
        return self.coder.decode(dense)
