"""Intervals: they cover, they widen where documents are alike inside, they know their limits."""

from __future__ import annotations

import pytest
import torch

from sae.evals.blocks import N_BLOCKS, BlockSums, BlockVariance, block_of
from sae.evals.bootstrap import resampling_weights, with_intervals
from sae.evals.interface import Undefined


def interval_of_mean(values: torch.Tensor, documents: torch.Tensor, seed: int = 0) -> dict:
    sums = BlockSums(("n", "value"))
    sums.add(block_of(documents), {"n": torch.ones_like(values), "value": values})

    def mean(weights):
        s = sums.weighted(weights)
        return {"mean": s["value"] / s["n"]}

    return with_intervals(mean, sums["n"] > 0, seed=seed, n_resamples=400)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    n_documents, n_each = 60, 20
    documents = torch.arange(n_documents).repeat_interleave(n_each)
    covered = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        of_document = torch.randn(n_documents, generator=generator).repeat_interleave(n_each)
        values = 1 + of_document + torch.randn(n_documents * n_each, generator=generator)
        found = interval_of_mean(values, documents, seed)
        covered += found["mean/low"] <= 1 <= found["mean/high"]
    assert 85 <= covered <= 100


def test_tokens_of_one_document_are_drawn_together():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, generator=generator).repeat_interleave(50)
    by_document = interval_of_mean(values, torch.arange(40).repeat_interleave(50))
    by_token = interval_of_mean(values, torch.arange(2000))
    widths = [found["mean/high"] - found["mean/low"] for found in (by_document, by_token)]
    assert widths[0] > 3 * widths[1]


def test_same_seed_same_interval_other_seed_another():
    values, documents = torch.arange(50.0), torch.arange(50)
    first, again, other = (interval_of_mean(values, documents, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_too_few_documents_have_a_value_but_no_interval():
    found = interval_of_mean(torch.arange(30.0), torch.arange(30) % 3)
    assert found["mean"] == pytest.approx(14.5)
    assert found["mean/low"] == Undefined("an interval needs 8 documents; there are 3")


def test_weights_draw_as_many_blocks_as_hold_tokens():
    is_present = torch.arange(N_BLOCKS) % 3 == 0
    weights = resampling_weights(is_present, seed=0, n_resamples=20)
    assert (weights.sum(1) == is_present.sum()).all()
    assert (weights[:, ~is_present] == 0).all()


def test_weighted_squares_equal_those_of_repeated_data():
    generator = torch.Generator().manual_seed(0)
    x = 1e4 + torch.randn(90, 5, generator=generator, dtype=torch.float64)
    blocks = torch.arange(90) % 9
    variance = BlockVariance(5, 9)
    variance.add(blocks[:40], x[:40])
    variance.add(blocks[40:], x[40:])
    weights = torch.tensor([0.0, 1, 2, 0, 3, 1, 1, 0, 4], dtype=torch.float64)
    repeated = x.repeat_interleave(weights[blocks].long(), dim=0)
    expected = (repeated - repeated.mean(0)).pow(2).sum()
    found = variance.weighted_squares(weights[None])
    torch.testing.assert_close(found, expected[None], rtol=1e-10, atol=0)
