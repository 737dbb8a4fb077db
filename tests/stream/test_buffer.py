"""The shuffle buffer: nothing lost, nothing doubled, well mixed, resumed bit for bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.stream.buffer import ShuffleBuffer


class Counting:
    """A source whose t-th row is (t, t), in pieces of at most `piece` rows."""

    def __init__(self, piece: int = 7):
        self.made, self.piece = 0, piece

    def __call__(self, n: int) -> torch.Tensor:
        n = min(n, self.piece)
        rows = torch.arange(self.made, self.made + n).float()
        self.made += n
        return rows[:, None].expand(n, 2)


def make(capacity: int = 40, **settings) -> tuple[ShuffleBuffer, Counting]:
    source = Counting()
    return ShuffleBuffer(source, capacity, 2, seed=3, **settings), source


def ids(batch: torch.Tensor) -> list[int]:
    return batch[:, 0].int().tolist()


@given(
    reuse=st.integers(1, 3),
    refill_fraction=st.sampled_from([0.25, 0.5, 1.0]),
    batch=st.integers(1, 90),
)
@settings(max_examples=30, deadline=None)
def test_each_row_comes_reuse_times_before_it_is_replaced(reuse, refill_fraction, batch):
    buffer, source = make(reuse=reuse, refill_fraction=refill_fraction)
    counts: Counter[int] = Counter()
    for _ in range(8):
        rows = buffer.next_batch(batch)
        assert rows.shape == (batch, 2)
        counts.update(ids(rows))
    assert max(counts.values()) <= reuse
    replaced = source.made - 40
    complete = sum(count == reuse for count in counts.values())
    assert complete >= replaced


def test_whole_passes_see_every_row_equally_often():
    buffer, source = make(reuse=3, refill_fraction=1.0)
    seen = Counter(ids(buffer.next_batch(120)))
    assert seen == Counter(dict.fromkeys(range(40), 3))
    assert source.made == 40


def test_rows_are_mixed_far_beyond_the_order_they_came_in():
    buffer, _ = make(capacity=2000)
    batch = torch.tensor(ids(buffer.next_batch(500))).float()
    neighbours = (batch[1:] - batch[:-1]).abs().mean()
    assert abs(neighbours - 2000 / 3) < 100
    assert batch.mean().sub(1000).abs() < 100


def test_batches_are_the_same_again_from_the_seed_and_not_from_another():
    first, again = make()[0], make()[0]
    other = ShuffleBuffer(Counting(), 40, 2, seed=4)
    assert ids(first.next_batch(30)) == ids(again.next_batch(30))
    assert ids(first.next_batch(30)) != ids(other.next_batch(30))


@pytest.mark.parametrize("taken", [0, 1, 13, 20, 33, 40, 77, 140])
def test_resume_is_exact(taken: int):
    """At the start, mid-cycle, at a refill and beyond."""
    buffer, source = make(reuse=2)
    if taken:
        buffer.next_batch(taken)
    position, storage, made = buffer.position_dict(), buffer.storage.clone(), source.made
    expected = [ids(buffer.next_batch(17)) for _ in range(6)]
    again, again_source = make(reuse=2)
    again_source.made = made
    again.load(position, storage)
    assert [ids(again.next_batch(17)) for _ in range(6)] == expected


def test_another_size_is_refused():
    buffer, _ = make()
    with pytest.raises(ValueError, match=r"\(\(40, 2\), 'float32'\); got \(\(30, 2\)"):
        buffer.load(buffer.position_dict(), torch.zeros(30, 2))


def test_a_batch_touches_only_its_own_rows(monkeypatch: pytest.MonkeyPatch):
    """No permutation is made between refills."""
    buffer, _ = make(capacity=100)
    buffer.next_batch(1)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: pytest.fail("work over the buffer"))
    for _ in range(4):
        buffer.next_batch(10)
