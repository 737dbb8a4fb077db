"""How far batches are from independent draws: the formula, and what buffers of any size reach."""

from __future__ import annotations

import itertools

import pytest
import torch
from toy_rows import CountingRows, buffered

from sae.stream.mixing import mixing, pair_share


def test_pairs_are_counted_as_by_hand():
    lanes = [[0, 0, 3, -1, 0], [0, 7, 7]]
    pairs = list(
        itertools.combinations([(i, d) for i, lane in enumerate(lanes) for d in lane if d >= 0], 2)
    )
    expected = sum(one == other for one, other in pairs) / len(pairs)
    assert pair_share([torch.tensor(lane) for lane in lanes]) == pytest.approx(expected)
    assert pair_share([torch.tensor([5])]) == 0


def shares(capacity: int, n_batches: int = 60) -> dict[str, float]:
    """Return the mean of what the log says, over batches of a text of 1,000 documents."""
    source = buffered(CountingRows(per_document=50, epoch_rows=50_000, piece=100), capacity)
    totals: dict[str, float] = {}
    for _ in range(n_batches):
        source.next_batch(500)
        for name, value in mixing(list(source.lanes.values())).items():
            totals[name] = totals.get(name, 0) + value / n_batches
    return totals


def test_a_buffer_draws_from_what_it_holds():
    for capacity in (1000, 8000):
        assert shares(capacity)["pairs_over_buffer"] == pytest.approx(1, abs=0.1)


def test_a_small_buffer_is_far_from_the_text_and_a_large_one_near():
    small, large = shares(1000), shares(30_000)
    assert small["pairs_over_text"] > 8
    assert large["pairs_over_text"] < 1.2
    assert small["same_document_pairs"] > 10 * large["same_document_pairs"]


def test_the_text_is_counted_once_however_often_it_is_read():
    source = buffered(CountingRows(per_document=50, epoch_rows=2000, piece=100), 1000)
    for _ in range(30):
        source.next_batch(500)
    lane = source.lanes[0]
    assert lane.stream.epoch > 3
    assert (lane.n_rows, lane.n_squared) == (2000, 40 * 50**2)
