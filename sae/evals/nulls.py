"""Null dictionaries, and the oracle of a world: what every measure must rank, as objects.

truth > trained > frozen random decoder ≥ random directions > codes shuffled in time

Each has encode (or encode_sparse) and decode, as any dictionary. How they are made for a dictionary
by name, and what each keeps of it, is in `null_rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.coder.latents import Latents, joined
from sae.evals.evaluable import Evaluable

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


class Directions:
    """Fixed directions: each token is written with those that it points along most.

    Args:
        rows: (m, d_in) unit vectors, which are read and written.
        b_dec: (d_in), taken from x before and added after.
        k: how many a token has at most.
        floor: what the last of these k must exceed, so that fewer than k can be had on average.
        is_signed: directions count both ways, and codes have signs; else no value is below 0.
    """

    def __init__(
        self, rows: Tensor, b_dec: Tensor, k: int, *, floor: float = 0.0, is_signed: bool = False
    ) -> None:
        self.W_dec, self.b_dec = rows, b_dec
        self.k, self.floor, self.is_signed = k, floor, is_signed
        self.d_sae, self.d_in = rows.shape

    @classmethod
    def at_l0(
        cls, rows: Tensor, sample: Tensor, l0: float, *, is_signed: bool = False
    ) -> Directions:
        """Return `rows` about the mean of `sample` (n, d_in), with `l0` of them a token on it."""
        b_dec = sample.mean(0)
        scores = (sample - b_dec) @ rows.T
        k, floor = budget(scores.abs() if is_signed else scores, l0)
        return cls(rows, b_dec, k, floor=floor, is_signed=is_signed)

    def encode_sparse(self, x: Tensor) -> Latents:
        """Return the k largest projections of each token."""
        scores = (x - self.b_dec) @ self.W_dec.T
        sizes, indices = torch.topk(scores.abs() if self.is_signed else scores, self.k)
        is_on = sizes > 0
        is_on[:, -1] &= sizes[:, -1] > self.floor
        return Latents(torch.where(is_on, scores.gather(1, indices), 0.0), indices)

    def decode(self, latents: Latents) -> Tensor:
        """Return x_hat (n, d_in)."""
        return latents.to_dense(self.d_sae) @ self.W_dec + self.b_dec


class RandomDirections(Directions):
    """Random unit directions, each token written with the k that point along it most."""

    def __init__(self, b_dec: Tensor, d_sae: int, k: int, seed: int = 0) -> None:
        super().__init__(random_directions(d_sae, len(b_dec), seed).to(b_dec), b_dec, k)


class PermutedDecoder:
    """A dictionary whose latents write one another's directions; its code stays.

    The permutation is one cycle through all latents: none keeps its own row.
    """

    def __init__(self, coder: Any, seed: int = 0) -> None:
        self.inner = as_evaluable(coder)
        self.sites, self.d_sae = self.inner.sites, self.inner.d_sae
        self.d_in = self.inner.d_in
        order = torch.randperm(self.d_sae, generator=torch.Generator().manual_seed(seed))
        self.writes = torch.empty_like(order)
        self.writes[order] = order.roll(1)
        directions = self.inner.directions()
        self.W_dec = directions[self.writes.to(directions.device)]

    def see(self, codes: Tensor) -> None:
        """Pass true codes on to a dictionary that takes them."""
        pass_on(self.inner, codes)

    def encode_sparse(self, x: Tensor) -> Latents:
        """Return the dictionary's own code."""
        return self.inner.code_of(x)

    def decode_for(self, latents: Latents, x: Tensor) -> Tensor:
        """Return what the code writes at x through other latents' rows."""
        writes = self.writes.to(latents.indices.device)
        return self.inner.write(Latents(latents.values, writes[latents.indices]), x)

    def decode(self, latents: Latents) -> Tensor:
        """Return x_hat, of a dictionary that needs no x to decode."""
        return self.decode_for(latents, latents.values.new_zeros(len(latents.values), self.d_in))


class ShuffledCodes:
    """A dictionary that gives each token the code of another one.

    As a null beside a dictionary, what it gives is one permutation of all evaluated tokens, made by
    `rotation` with the help of `inner`. Called by itself it gives each of the rows of a call the
    code half of them further on; with `first`, that of the token as many before it as `first` has,
    over all calls, and the first ones those of `first`.

    Args:
        d_sae: the number of latents; None: the coder's own word.
        first: codes of the tokens before the first call, (n, k).
    """

    def __init__(
        self, coder: Any, d_sae: int | None = None, *, first: Latents | None = None
    ) -> None:
        self.inner = as_evaluable(coder)
        self.inner.d_sae = d_sae or self.inner.d_sae
        self.sites, self.d_sae = self.inner.sites, self.inner.d_sae
        self.d_in, self.W_dec = self.inner.d_in, self.inner.directions()
        self._waiting = first

    def see(self, codes: Tensor) -> None:
        """Pass true codes on to a dictionary that takes them."""
        pass_on(self.inner, codes)

    def encode_sparse(self, x: Tensor) -> Latents:
        """Return codes of other tokens."""
        own = self.inner.code_of(x)
        if self._waiting is None:
            return Latents(*(part.roll(max(len(x) // 2, 1), 0) for part in own))
        given, self._waiting = split(joined([self._waiting, own]), len(x))
        return given

    def decode_for(self, latents: Latents, x: Tensor) -> Tensor:
        """Return what the code writes at x."""
        return self.inner.write(latents, x)

    def decode(self, latents: Latents) -> Tensor:
        """Return x_hat, of a dictionary that needs no x to decode."""
        return self.decode_for(latents, latents.values.new_zeros(len(latents.values), self.d_in))


def random_directions(m: int, d: int, seed: int) -> Tensor:
    """Return m random unit rows, (m, d) float32."""
    rows = torch.randn(m, d, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def principal_components(sample: Tensor, m: int) -> Tensor:
    """Return the min(m, d) directions along which `sample` (n, d) varies most, largest first."""
    centred = (sample - sample.mean(0)).double()
    found = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T[:m]
    return found.to(sample.dtype).contiguous()


def budget(scores: Tensor, l0: float) -> tuple[int, float]:
    """Return how many of its largest scores a token keeps at most, and what the last must exceed.

    So that of `scores` (n, m) `l0` above 0 a token are kept, or all of them where there are fewer.
    """
    n_ranked = min(2 * int(l0) + 8, scores.shape[1])
    ranked = torch.topk(scores, n_ranked).values.clamp_min(0)
    kept = (ranked > 0).double().mean(0).cumsum(0)
    k = int(torch.searchsorted(kept, torch.tensor(l0, dtype=kept.dtype, device=kept.device)))
    if k == n_ranked:
        return n_ranked, 0.0
    wanted = l0 - (float(kept[k - 1]) if k else 0.0)
    last = ranked[:, k].sort(descending=True).values
    at = round(wanted * len(last))
    return k + 1, float(last[at]) if at < len(last) else 0.0


def as_evaluable(coder: Any) -> Evaluable:
    """Return what evals see of `coder`."""
    if isinstance(coder, Evaluable):
        return coder
    if hasattr(coder, "sites"):
        return Evaluable(coder, coder.sites.width)
    return Evaluable(coder, int(getattr(coder, "d_in", None) or coder.W_dec.shape[1]))


def pass_on(coder: Evaluable, codes: Tensor) -> None:
    """Give true codes to a dictionary that takes them."""
    if hasattr(coder.coder, "see"):
        coder.coder.see(codes)


def split(code: Latents, n: int) -> tuple[Latents, Latents]:
    """Return the code of the first n tokens, and that of the others."""
    first, rest = (Latents(code.values[at], code.indices[at]) for at in (slice(n), slice(n, None)))
    return first, rest
