"""Random inputs, several sets of each, so that no call finds the last one's data in a cache.

Uniform: every latent fires alike. Log-normal: the latents' firing rates are log-normal, as they
are in trained dictionaries, and one hub latent fires on every token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from .checking import count_above
from .shapes import Firing, Shape

MIN_SETS = 3
SIGMA = 1.5  # of the log of the firing rates
CHUNK_ELEMENTS = 2**28  # drawn at a time, so that temporaries stay small beside the inputs
HUB_WEIGHT = 1e30
BANDWIDTH = 0.125  # JumpReLU's window, in standard deviations of a pre-activation
ROOM = 1.25


@dataclass(frozen=True)
class PreActs:
    """Pre-activations x (n, d_sae); x > theta (d_sae) holds for about k latents a token.

    The capacities leave room beyond what is above theta, and within BANDWIDTH below it: an op that
    finds its capacity too small ends the use of the GPU.
    """

    x: Tensor
    theta: Tensor
    k: int
    capacity: int
    window_capacity: int


@dataclass(frozen=True)
class Code:
    """A sparse code, the decoder, and a row of width d a token: a target, an input, a gradient.

    `offsets` (n + 1,) say the same code in its ragged form.
    """

    values: Tensor
    indices: Tensor
    W_dec: Tensor
    b_dec: Tensor
    target: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Batch:
    """Tokens x (n, d) and a whole dictionary."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    k: int


@dataclass(frozen=True)
class Weights:
    """An optimiser's parameters, as zeros, and their gradients: (2, d_sae, d) fp32 each."""

    parameters: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Update:
    """A code with its gradients, as an optimiser's step on the whole dictionary reads them.

    `kept` holds, for all sets, the dictionary that the steps change; it is made when it is needed,
    from `draw_weight`, since its size depends on the moments' format.
    """

    values: Tensor
    indices: Tensor
    grad_pre_acts: Tensor
    grad_x_hat: Tensor
    x: Tensor
    d_sae: int
    draw_weight: Callable[[], Tensor]
    kept: dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """Where and how inputs are drawn."""

    device: torch.device
    dtype: torch.dtype
    l2_bytes: int
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=self.generator)

    def n_sets(self, set_bytes: int) -> int:
        """Return how many sets of this size are at least three and more than the L2 holds."""
        return max(MIN_SETS, self.l2_bytes // max(set_bytes, 1) + 1)

    def firing_rates(self, shape: Shape, firing: Firing) -> Tensor:
        """Return (d_sae,) fp32 expected firings a token, their sum k; the hub's comes on top."""
        if firing == "uniform":
            return torch.full((shape.d_sae,), shape.k / shape.d_sae, device=self.device)
        spread = torch.randn(shape.d_sae, device=self.device, generator=self.generator)
        rates = (SIGMA * spread).exp()
        return (rates * (shape.k / rates.sum())).clamp(1e-9, 0.9)


def hub_of(shape: Shape) -> int:
    """Return the latent that fires on every token when rates are log-normal."""
    return shape.d_sae // 3


def draw_pre_acts(draw: Draw, shape: Shape, firing: Firing) -> list[PreActs]:
    """Return sets of pre-activations: normal numbers, shifted by each latent's firing rate."""
    cut = NormalDist().inv_cdf(1 - shape.k / shape.d_sae) if shape.k < shape.d_sae else 0.0
    theta = torch.full((shape.d_sae,), cut, dtype=draw.dtype, device=draw.device)
    shift = _pre_act_shift(draw, shape, firing)

    def one() -> PreActs:
        x = draw.normal(shape.n, shape.d_sae)
        x = x if shift is None else x.add_(shift)
        n_above, n_close = count_above(x, theta), count_above(x, theta - BANDWIDTH)
        return PreActs(x, theta, shape.k, int(ROOM * n_above), int(ROOM * (n_close - n_above)))

    return _sets(one, draw.n_sets(shape.n * shape.d_sae * draw.dtype.itemsize))


def draw_codes(draw: Draw, shape: Shape, firing: Firing) -> list[Code]:
    """Return sets of codes: distinct latents a token, drawn in proportion to their rates.

    A decoder small enough to stay in L2 is drawn anew for each set.
    """
    rates = draw.firing_rates(shape, firing)
    if firing == "log-normal":
        rates[hub_of(shape)] = HUB_WEIGHT
    weights: list[tuple[Tensor, Tensor]] = []
    decoder_bytes = shape.d_sae * shape.d * draw.dtype.itemsize
    offsets = torch.arange(0, shape.n * shape.k + 1, shape.k, device=draw.device)

    def one() -> Code:
        if not weights or decoder_bytes <= draw.l2_bytes:
            weights[:] = [(_weight(draw, shape), draw.normal(shape.d))]
        values = draw.normal(shape.n, shape.k).abs_()
        indices = _distinct_latents(draw, shape, rates)
        return Code(values, indices, *weights[0], draw.normal(shape.n, shape.d), offsets)

    itemsize = draw.dtype.itemsize
    return _sets(one, draw.n_sets(shape.n * (shape.d * itemsize + shape.k * (8 + itemsize))))


def draw_batches(draw: Draw, shape: Shape, firing: Firing) -> list[Batch]:
    """Return sets of tokens, and one dictionary whose biases give the firing rates."""
    W_enc, W_dec = _weight(draw, shape), _weight(draw, shape)
    shift = _pre_act_shift(draw, shape, firing)
    b_enc = torch.zeros(shape.d_sae, dtype=draw.dtype, device=draw.device)
    b_enc = b_enc if shift is None else b_enc + shift
    b_dec = draw.normal(shape.d) * 0.1

    def one() -> Batch:
        return Batch(draw.normal(shape.n, shape.d), W_enc, b_enc, W_dec, b_dec, shape.k)

    return _sets(one, draw.n_sets(shape.n * shape.d * draw.dtype.itemsize))


def draw_updates(draw: Draw, shape: Shape, firing: Firing) -> list[Update]:
    """Return sets of codes with gradients, and one place for the dictionary that they update."""
    rates = draw.firing_rates(shape, firing)
    if firing == "log-normal":
        rates[hub_of(shape)] = HUB_WEIGHT
    kept: dict[str, Any] = {}

    def unit_rows() -> Tensor:
        size = shape.d_sae, shape.d
        weight = torch.randn(size, device=draw.device, generator=draw.generator)
        return weight.div_(weight.norm(dim=1, keepdim=True))

    def one() -> Update:
        values, gradients = (draw.normal(shape.n, shape.k) for _ in range(2))
        indices = _distinct_latents(draw, shape, rates)
        grad_x_hat, x = (draw.normal(shape.n, shape.d) for _ in range(2))
        return Update(values, indices, gradients, grad_x_hat, x, shape.d_sae, unit_rows, kept)

    itemsize = draw.dtype.itemsize
    return _sets(one, draw.n_sets(2 * shape.n * (shape.d * itemsize + shape.k * (4 + itemsize))))


def draw_weights(draw: Draw, shape: Shape, firing: Firing) -> list[Weights]:  # noqa: ARG001 - as the others
    """Return one set: parameters and optimiser state together are many times the L2."""
    size = (2, shape.d_sae, shape.d)
    gradients = torch.randn(size, device=draw.device, generator=draw.generator)
    return [Weights(torch.zeros_like(gradients), gradients)]


def _sets(one: Callable[[], object], n_sets: int) -> list:
    return [one() for _ in range(n_sets)]


def _weight(draw: Draw, shape: Shape) -> Tensor:
    """Return a weight (d_sae, d) whose rows have a norm of about 1."""
    return draw.normal(shape.d_sae, shape.d).div_(math.sqrt(shape.d))


def _pre_act_shift(draw: Draw, shape: Shape, firing: Firing) -> Tensor | None:
    """Return (d_sae,) such that a normal number plus it passes one cut at the latent's rate."""
    if firing == "uniform":
        return None
    rates = draw.firing_rates(shape, firing).double()
    mean = torch.full_like(rates, shape.k / shape.d_sae)
    shift = torch.special.ndtri(rates) - torch.special.ndtri(mean)
    shift[hub_of(shape)] = 20.0
    return shift.to(draw.dtype)


def _distinct_latents(draw: Draw, shape: Shape, rates: Tensor) -> Tensor:
    """Return (n, k) int64 latents, distinct in a row: the largest of rate / exponential number."""
    indices = torch.empty((shape.n, shape.k), dtype=torch.int64, device=draw.device)
    chunk = max(1, CHUNK_ELEMENTS // shape.d_sae)
    for start in range(0, shape.n, chunk):
        rows = indices[start : start + chunk]
        noise = torch.empty((len(rows), shape.d_sae), device=draw.device)
        noise.exponential_(generator=draw.generator)
        rows.copy_(torch.div(rates, noise, out=noise).topk(shape.k, dim=1, sorted=False)[1])
    return indices
