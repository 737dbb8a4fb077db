"""Sparsity: counts against dense references, honest answers about latents that never fire."""

from __future__ import annotations

import pytest
import torch
from eval_stand_ins import assert_same, make_batch, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.coder.latents import Latents
from sae.evals.interface import EvalBatch, EvalSetup, Undefined
from sae.evals.sparsity import Sparsity


def codes(n: int = 500, d_sae: int = 40, seed: int = 0) -> torch.Tensor:
    """Codes whose latent j fires with probability falling in j, the last ones never; signed."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.linspace(0.5, -0.1, d_sae)
    fires = torch.rand(n, d_sae, generator=generator) < rates
    return torch.where(fires, torch.randn(n, d_sae, generator=generator), 0.0)


def accumulated(dense: torch.Tensor) -> Sparsity:
    accumulator = Sparsity(EvalSetup(4, dense.shape[1], n_resamples=50))
    x = torch.zeros(len(dense), 4)
    accumulator.update(make_batch(x, x, codes=dense))
    return accumulator


def test_equals_the_dense_reference():
    dense = codes()
    fires = dense != 0
    l0, rates = fires.sum(1).double(), fires.double().mean(0)
    found, arrays = accumulated(dense).compute(), accumulated(dense).arrays()
    assert found["l0"] == pytest.approx(float(l0.mean()))
    assert found["l0_sd"] == pytest.approx(float(l0.std(correction=0)))
    expected_p99 = torch.quantile(l0, 0.99, interpolation="higher")
    assert found["l0_p99"] in (float(expected_p99), float(expected_p99) - 1)
    assert found["dead"] == pytest.approx(float((rates == 0).double().mean()))
    assert found["dense"] == pytest.approx(float((rates > 0.1).double().mean()))
    alive = rates[rates > 0]
    assert found["dense_of_alive"] == pytest.approx(float((alive > 0.1).double().mean()))
    assert torch.equal(arrays["firing_counts"], fires.sum(0))
    assert torch.equal(arrays["max_activations"], dense.abs().amax(0))
    assert int(arrays["log10_firing_rate_histogram"].sum()) == len(alive)


def test_negative_activations_fire():
    dense = torch.zeros(50, 3)
    dense[:, 1] = -1
    assert accumulated(dense).compute()["l0"] == 1


def test_unused_slots_do_not_fire():
    values, indices = torch.tensor([[1.0, 0.0]] * 20), torch.tensor([[2, 0]] * 20)
    x = torch.zeros(20, 4)
    ids = torch.arange(20)
    accumulator = Sparsity(EvalSetup(4, 5, n_resamples=10))
    accumulator.update(EvalBatch(x, x, Latents(values, indices), ids, ids))
    assert accumulator.arrays()["firing_counts"].tolist() == [0, 0, 20, 0, 0]


def test_dead_dictionary_is_reported_dead():
    found = accumulated(torch.zeros(60, 7)).compute()
    assert found["dead"] == 1
    assert found["l0"] == 0
    assert found["dead_rate_bound"] == pytest.approx(0.05)
    assert isinstance(found["dense_of_alive"], Undefined)


def test_rates_that_so_few_tokens_cannot_show_are_undefined():
    found = accumulated(codes(200)).compute()
    assert "300,000" in found["rate_under_1e-5"].reason


def test_rates_are_given_once_enough_tokens_were_seen():
    accumulator = Sparsity(EvalSetup(1, 4, n_resamples=10))
    n = 300_000
    values, indices = torch.ones(n, 1), torch.zeros(n, 1, dtype=torch.long)
    indices[0] = 1
    ids, x = torch.arange(n), torch.zeros(n, 1)
    accumulator.update(EvalBatch(x, x, Latents(values, indices), ids, ids))
    found = accumulator.compute()
    assert found["rate_under_1e-5"] == 0.75
    assert found["dead"] == 0.5


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_split_order_and_merge_do_not_matter(data):
    dense = codes(60)
    whole = accumulated(dense)
    batch = make_batch(torch.zeros(60, 4), torch.zeros(60, 4), codes=dense)
    order = torch.tensor(data.draw(st.permutations(range(60))))
    cut = data.draw(st.integers(0, 60))
    parts = [Sparsity(whole.setup) for _ in range(2)]
    for part, index in zip(parts, (order[:cut], order[cut:]), strict=True):
        part.update(rows(batch, index))
    first, second = data.draw(st.permutations(parts))
    first.merge(second)
    assert_same(first.compute(), whole.compute(), rel=1e-12)
    for name, array in whole.arrays().items():
        assert torch.equal(first.arrays()[name], array)


def test_kurtosis_is_that_of_all_tokens_and_of_latents_that_vary():
    dense = codes(d_sae=6)
    dense[:, 4], dense[:, 5] = 2.0, 0.0  # one never varies, one never fires
    z = dense[:, :4].double() - dense[:, :4].double().mean(0)
    expected = (z.pow(4).mean(0) / z.pow(2).mean(0).pow(2)).mean()
    found = accumulated(dense).compute()["kurtosis"]
    assert found == pytest.approx(float(expected), rel=1e-9)
    dead = accumulated(torch.zeros(10, 3)).compute()["kurtosis"]
    assert isinstance(dead, Undefined)
