"""Reconstruction: the rows that public code gets wrong, and what may not change a value."""

from __future__ import annotations

import pytest
import torch
from eval_stand_ins import assert_same, make_batch, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.evals.interface import EvalBatch, EvalSetup, Undefined
from sae.evals.reconstruction import Reconstruction

D = 6
SETUP = EvalSetup(D, D, n_resamples=50)


def sample(n: int = 400, seed: int = 0, mean: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.3, 3, D, dtype=torch.float64)
    return mean + scales * torch.randn(n, D, generator=generator, dtype=torch.float64)


def computed(batch: EvalBatch, setup: EvalSetup = SETUP) -> dict:
    accumulator = Reconstruction(setup)
    accumulator.update(batch)
    return accumulator.compute()


def reference_fvu(x: Tensor, x_hat: Tensor) -> float:
    return float((x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


@pytest.mark.parametrize("mean", [0.0, 3.0, 1e4])
def test_reconstructing_the_mean_explains_nothing(mean):
    x = sample(mean=mean)
    found = computed(make_batch(x, x.mean(0).expand_as(x)))
    assert found["explained_variance"] == pytest.approx(0, abs=1e-12)


def test_reconstructing_exactly_explains_everything():
    x = sample()
    found = computed(make_batch(x, x))
    assert found["explained_variance"] == 1
    assert found["fvu_worst_1pct"] == 0
    assert found["gamma"] == pytest.approx(1, abs=1e-12)
    assert found["cosine"] == pytest.approx(1, abs=1e-12)
    assert found["norm_ratio"] == pytest.approx(1, abs=1e-12)


def test_a_constant_offset_of_the_reconstruction_is_an_error():
    x = sample()
    assert computed(make_batch(x, x + 10))["explained_variance"] < 0


@pytest.mark.parametrize("shift", [1.0, 1e3, -1e5])
def test_adding_a_constant_to_x_changes_nothing(shift):
    x = sample(mean=0)
    x_hat = 0.7 * x
    before = computed(make_batch(x, x_hat))
    after = computed(make_batch(x + shift, x_hat + shift))
    for name in ("fvu", "fvu/low", "fvu/high", "mse", "fvu_worst_1pct"):
        assert after[name] == pytest.approx(before[name], rel=1e-8)


def test_float32_activations_far_from_zero_lose_no_digits():
    x = (1000 + sample(mean=0)).float()
    x_hat = x + 0.5 * sample(seed=1, mean=0).float()
    expected = reference_fvu(x.double(), x_hat.double())
    assert computed(make_batch(x, x_hat))["fvu"] == pytest.approx(expected, rel=1e-9)


def test_rotating_the_data_changes_nothing():
    x = sample()
    x_hat = x + 0.3 * sample(seed=1, mean=0)
    q = torch.linalg.qr(sample(D, seed=2)).Q
    before, after = computed(make_batch(x, x_hat)), computed(make_batch(x @ q, x_hat @ q))
    assert after == pytest.approx(before, rel=1e-9)


def test_masked_bos_earns_nothing():
    """A BOS of 200 times the norm, given back while all else is zeroed, is no reconstruction."""
    x = sample(mean=0)
    x[::20] = 200 * x.norm(dim=1).mean() * torch.eye(D, dtype=torch.float64)[0]
    is_bos = torch.arange(len(x)) % 20 == 0
    x_hat = torch.where(is_bos[:, None], x, 0.0)
    assert computed(make_batch(x, x_hat))["explained_variance"] > 0.99
    kept = (~is_bos).nonzero().squeeze(1)
    masked = computed(rows(make_batch(x, x_hat), kept))
    assert masked["explained_variance"] <= 0
    assert masked["cosine"] == 0


def test_gamma_sees_shrinkage():
    x = sample()
    found = computed(make_batch(x, 0.8 * x))
    assert found["gamma"] == pytest.approx(0.8)
    assert found["norm_ratio"] == pytest.approx(0.8)


def test_worst_percent_is_fvu_on_the_worst_tokens():
    x = sample(1000, mean=0)
    x_hat = 0.99 * x
    x_hat[:10] = -9 * x[:10] / x[:10].norm(dim=1, keepdim=True)
    worst = (x - x_hat)[:10].pow(2).sum() / (x[:10] - x.mean(0)).pow(2).sum()
    found = computed(make_batch(x, x_hat))
    assert found["fvu_worst_1pct"] == pytest.approx(float(worst), rel=1e-9)
    assert found["fvu_worst_1pct"] > 5 * found["fvu"]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_split_order_and_merge_tree_do_not_matter(data):
    n = data.draw(st.integers(2, 120))
    offset = data.draw(st.sampled_from([0.0, 50.0, 1e4]))
    x = sample(n, mean=offset)
    ids = torch.randint(0, data.draw(st.integers(1, 2000)), (n,), generator=seeded(n))
    batch = make_batch(x, x + sample(n, seed=1, mean=0.1), ids)
    expected = computed(batch)

    order = torch.tensor(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    parts = [Reconstruction(SETUP) for _ in range(len(cuts) + 1)]
    for part, start, end in zip(parts, [0, *cuts], [*cuts, n], strict=True):
        part.update(rows(batch, order[start:end]))
    while len(parts) > 1:
        taken = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts[data.draw(st.integers(0, len(parts) - 1))].merge(taken)

    assert parts[0].seen.n_tokens == n
    assert parts[0].seen.n_documents == len(ids.unique())
    assert_same(parts[0].compute(), expected, rel=1e-9)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_merging_leaves_the_other_as_it_was():
    x = sample()
    one, other = Reconstruction(SETUP), Reconstruction(SETUP)
    one.update(make_batch(x, 0.5 * x))
    other.update(make_batch(x, 0.9 * x))
    before = other.compute()
    one.merge(other)
    assert other.compute() == before


def test_constant_activations_are_undefined_with_a_reason():
    x = torch.full((1000, D), 0.1, dtype=torch.float64)
    ids = torch.arange(1000).sqrt().long()
    found = computed(make_batch(x, x, ids))
    for name in ("fvu", "explained_variance", "fvu_worst_1pct"):
        assert found[name] == Undefined("the activations do not vary")
    assert found["mse"] == 0


def test_zero_activations_and_reconstructions_give_no_nan():
    x = torch.zeros(30, D)
    found = computed(make_batch(x, x))
    assert found["cosine"] == 0
    assert isinstance(found["norm_ratio"], Undefined)
    assert isinstance(found["gamma"], Undefined)


def test_no_tokens_is_undefined():
    assert isinstance(Reconstruction(SETUP).compute()["fvu"], Undefined)
