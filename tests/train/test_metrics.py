"""The log's sums: right where naive algebra is wrong, the same for any split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.coder import Latents
from sae.train.dead import DeadLatents, firings
from sae.train.metrics import MetricSums


def batch(n: int = 60, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, Latents]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator) + offset
    residual = 0.3 * torch.randn(n, 5, generator=generator)
    values = torch.rand(n, 3, generator=generator).round(decimals=1)
    indices = torch.randint(0, 9, (n, 3), generator=generator)
    return x, residual, Latents(values, indices)


def computed(splits: list[int], offset: float = 0.0) -> dict[str, float]:
    x, residual, code = batch(offset=offset)
    sums = MetricSums(torch.full((5,), offset), ("loss",))
    start = 0
    for size in [*splits, len(x) - sum(splits)]:
        part = slice(start, start + size)
        loss = residual[part].pow(2).mean() if size else torch.tensor(0.0)
        code_part = Latents(code.values[part], code.indices[part])
        sums.update(x[part], residual[part], code_part, {"loss": loss})
        start += size
    return sums.compute()


@given(st.lists(st.integers(0, 15), max_size=4))
@settings(max_examples=20, deadline=None)
def test_any_split_gives_the_same(splits: list[int]):
    whole, parts = computed([]), computed(splits)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-6), name


def test_fvu_and_l0_are_the_definitions():
    x, residual, code = batch()
    wide = x.double()
    expected = residual.double().pow(2).sum() / (wide - wide.mean(0)).pow(2).sum()
    values = computed([])
    assert values["fvu"] == pytest.approx(float(expected), rel=1e-6)
    assert values["l0"] == pytest.approx(float((code.values != 0).float().sum(1).mean()))


def test_a_large_common_offset_costs_no_digits():
    assert computed([], offset=1000.0)["fvu"] == pytest.approx(computed([])["fvu"], rel=1e-3)


def test_clear_begins_anew_and_empty_is_no_row():
    sums = MetricSums(torch.zeros(5), ())
    assert sums.compute() == {}
    x, residual, code = batch()
    sums.update(x, residual, code, {})
    sums.clear()
    assert sums.compute() == {}


def test_fired_is_the_same_for_sparse_and_dense():
    _, _, code = batch(4)
    assert torch.equal(firings(code, 9) > 0, firings(code.to_dense(9), 9) > 0)
    assert not firings(Latents(torch.zeros(2, 1), torch.tensor([[3], [3]])), 9).any()


def test_dead_means_silent_for_that_many_tokens():
    dead = DeadLatents(6, dead_after_tokens=100, k_aux=1, device=torch.device("cpu"))
    fires = Latents(torch.ones(1, 2), torch.tensor([[1, 4]]))
    dead.update(fires, tokens_seen=50)
    dead.refresh(99)
    assert dead.indices.tolist() == []
    dead.refresh(100)
    assert dead.indices.tolist() == [0, 2, 3, 5]
    assert float(dead.share(100)) == pytest.approx(4 / 6)
    dead.refresh(149)
    assert len(dead.indices) == 4
    dead.refresh(150)
    assert len(dead.indices) == 4  # all six are dead, 4 k_aux are listed: the longest silent
    assert dead.indices.tolist() == [0, 2, 3, 5]


def test_reading_metrics_trains_nothing():
    dead = DeadLatents(6, dead_after_tokens=1, k_aux=1, device=torch.device("cpu"))
    before = dead.last_fired_at.clone()
    dead.share(10)
    assert torch.equal(before, dead.last_fired_at)
