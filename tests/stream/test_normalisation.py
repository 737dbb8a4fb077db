"""Normalisers: the units they promise, dead directions, ranks, precision, the way back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.coder.layer_norm import layer_norm, undo_layer_norm
from sae.config import NormalisationName
from sae.stream.normalisation import FITS, FLOOR, Normaliser

D = 12
AFFINE = ("standardise", "whiten")
SCALED = ("mean_norm", *AFFINE)


def sample(n: int = 400, seed: int = 0, d: int = D) -> Tensor:
    """Correlated activations with a mean, dimensions of very different size, and heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator) * torch.logspace(-0.5, 0.5, d)
    return torch.randn(n, d, generator=generator).pow(3) @ mixing + 5 * torch.arange(d)


def covariance(x: Tensor) -> Tensor:
    centred = x.double() - x.double().mean(0)
    return centred.T @ centred / len(x)


def test_every_kind_of_the_configuration_has_a_row():
    assert tuple(FITS) == get_args(NormalisationName)


def test_each_kind_gives_the_units_it_names():
    x = sample()
    done = {kind: Normaliser.fit(x, kind).apply(x).double() for kind in FITS}
    torch.testing.assert_close(done["none"], x.double())
    assert done["mean_norm"].norm(dim=1).mean() == pytest.approx(D**0.5, rel=1e-6)
    torch.testing.assert_close(
        done["mean_norm"] / x, (done["mean_norm"] / x)[:1, :1].expand(x.shape)
    )
    for kind in AFFINE:
        torch.testing.assert_close(done[kind].mean(0), torch.zeros(D).double(), atol=1e-5, rtol=0)
        assert done[kind].square().sum(1).mean() == pytest.approx(D, rel=1e-5)
    ones = torch.ones(D, dtype=torch.float64)
    torch.testing.assert_close(done["standardise"].var(0, correction=0), ones, rtol=1e-5, atol=0)
    torch.testing.assert_close(covariance(done["whiten"]), ones.diag(), rtol=1e-4, atol=1e-4)
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    expected = (x - mean) / (deviation + 1e-5)
    torch.testing.assert_close(done["layer_norm"], expected.double(), rtol=1e-5, atol=1e-6)


def test_whitening_is_the_symmetric_root():
    """ZCA: of all whitenings the one nearest to the identity; no rotation is added."""
    normaliser = Normaliser.fit(sample(), "whiten")
    assert normaliser.factor is not None
    assert torch.equal(normaliser.factor, normaliser.factor.T)
    assert (torch.linalg.eigvalsh(normaliser.factor.double()) > 0).all()
    root = torch.linalg.inv(normaliser.factor.double())
    expected = covariance(sample())
    torch.testing.assert_close(root @ root, expected, rtol=1e-4, atol=1e-4 * expected.trace() / D)


@settings(max_examples=12, deadline=None)
@given(power=st.integers(-12, 12), kind=st.sampled_from(SCALED))
def test_units_of_the_data_do_not_matter(power: int, kind: NormalisationName):
    x, factor = sample(200), 2.0**power
    scaled = Normaliser.fit(x * factor, kind).apply(x * factor)
    torch.testing.assert_close(scaled, Normaliser.fit(x, kind).apply(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", AFFINE)
@pytest.mark.parametrize("spoil", ["constant", "zero", "copied"])
def test_dead_directions_stay_dead_and_never_explode(kind: NormalisationName, spoil: str):
    x = sample()
    x[:, 3] = {"constant": torch.tensor(70.0), "zero": torch.tensor(0.0), "copied": x[:, 4]}[spoil]
    normaliser = Normaliser.fit(x, kind)
    done = normaliser.apply(x).double()
    assert done.square().sum(1).mean() == pytest.approx(D, rel=1e-4)
    if spoil != "copied":
        assert done[:, 3].abs().max() < 1e-3
    live = covariance(done)
    sizes = torch.linalg.eigvalsh(live) if kind == "whiten" else live.diagonal()
    n_dead = 1 if kind == "whiten" or spoil != "copied" else 0
    expected = torch.full((D,), D / (D - n_dead), dtype=torch.float64)
    expected[:n_dead] = 0
    torch.testing.assert_close(sizes.sort().values, expected, rtol=1e-3, atol=1e-3)
    # What varies there later, as much as an average direction does, is bounded by the floor.
    assert normaliser.factor is not None
    direction = torch.zeros(D)
    direction[3], direction[4] = 1.0, -1.0 if spoil == "copied" else 0.0
    direction = direction / direction.norm() * float(covariance(x).trace() / D) ** 0.5
    later = normaliser.apply(x[:1] + direction) - normaliser.apply(x[:1])
    assert later.norm() <= 1.1 / FLOOR**0.5


def test_a_sample_without_any_variance_gives_finite_zeros():
    for kind in FITS:
        for x in (torch.zeros(50, D), torch.full((50, D), 0.1)):
            assert torch.isfinite(Normaliser.fit(x, kind).apply(x)).all(), kind
    for kind in AFFINE:
        x = torch.full((50, D), 0.1)
        assert not Normaliser.fit(x, kind).apply(x).any()


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match=r"more tokens.*got 12 tokens, d_in=12.*calibration_sequ"):
        Normaliser.fit(sample(D), "whiten")
    with pytest.raises(ValueError, match="at least two numbers"):
        Normaliser.fit(torch.randn(9, 1), "layer_norm")


class Ranks:
    """Adds tensors up over threads that stand for processes."""

    def __init__(self, n: int):
        self.n, self.barrier = n, threading.Barrier(n, timeout=20)
        self.given: list[Tensor] = [torch.empty(0)] * n

    def sum_for(self, rank: int) -> Callable[[Tensor], Tensor]:
        def over_ranks(x: Tensor) -> Tensor:
            self.given[rank] = x
            self.barrier.wait()
            total = torch.stack(self.given).sum(0)
            self.barrier.wait()
            return total

        return over_ranks


@pytest.mark.parametrize("kind", FITS)
def test_ranks_with_parts_of_a_sample_fit_what_one_fits_on_the_whole(kind: NormalisationName):
    """Parts of unequal size and unequal mean, one smaller than d_in: averaging the ranks' own
    normalisers, or their means without weights, would give another result.
    """
    x = sample()
    parts = (x[x[:, 0] > 0], x[x[:, 0] <= 0][:5], x[x[:, 0] <= 0][5:])
    assert len({len(part) for part in parts}) == 3
    ranks, found = Ranks(3), [Normaliser("none")] * 3

    def run(rank: int) -> None:
        found[rank] = Normaliser.fit(parts[rank], kind, ranks.sum_for(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = Normaliser.fit(x, kind).apply(x)
    for normaliser in found:
        torch.testing.assert_close(normaliser.apply(x), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", AFFINE)
def test_a_large_mean_costs_no_precision(kind: NormalisationName):
    """Mean 1000 times the standard deviation: the shift goes first, in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, D, generator=generator) * torch.logspace(-0.5, 0.5, D) + 1000
    normaliser = Normaliser.fit(x, kind)
    assert normaliser.shift is not None
    assert normaliser.factor is not None
    centred, factor = x.double() - normaliser.shift.double(), normaliser.factor.double()
    exact = centred @ factor if factor.ndim == 2 else centred * factor
    assert (normaliser.apply(x) - exact).abs().max() < 5e-6
    assert exact.square().sum(1).mean() == pytest.approx(D, rel=1e-3)


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_are_normalised_in_float32(kind: NormalisationName, dtype: torch.dtype):
    x = (sample(64) + 100).to(dtype)
    normaliser = Normaliser.fit(x, kind)
    assert normaliser.apply(x).dtype == torch.float32
    assert torch.equal(normaliser.apply(x), normaliser.apply(x.float()))


def test_layer_norm_is_undone_by_the_tokens_own_moments():
    x = sample().reshape(20, 20, D)
    torch.testing.assert_close(undo_layer_norm(layer_norm(x), x), x, rtol=1e-4, atol=1e-4)
    flat = torch.full((2, D), 3.0)
    assert not layer_norm(flat).any()
    assert torch.equal(undo_layer_norm(torch.ones(2, D), flat), flat)
