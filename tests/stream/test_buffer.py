"""The shuffle buffer: nothing lost, nothing doubled, well mixed, resumed bit for bit."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from toy_rows import CountingRows, assert_resumes_exactly, buffered, ids, saved

from sae.stream.lanes import Lane


@given(
    reuse=st.integers(1, 3),
    refill_fraction=st.sampled_from([0.25, 0.5, 1.0]),
    batch=st.integers(1, 90),
)
@settings(max_examples=30, deadline=None)
def test_each_row_comes_reuse_times_before_it_is_replaced(reuse, refill_fraction, batch):
    rows = CountingRows()
    source = buffered(rows, reuse=reuse, refill_fraction=refill_fraction)
    counts: Counter[float] = Counter()
    for _ in range(8):
        taken = source.next_batch(batch)
        assert taken.shape == (batch, 2)
        counts.update(ids(taken))
    assert max(counts.values()) <= reuse
    buffer = source.lanes[0].buffer
    replaced = buffer.cycle * buffer.rows_replaced + buffer.written
    assert sum(count == reuse for count in counts.values()) >= replaced
    assert rows.made - 40 - replaced < 7  # one block ahead at most


@pytest.mark.parametrize("refill_fraction", [0.25, 0.5, 1.0])
def test_no_row_is_lost(refill_fraction: float):
    source = buffered(CountingRows(), refill_fraction=refill_fraction)
    seen = ids(source.next_batch(4000))
    assert len(set(seen)) == 4000
    assert set(map(float, range(3500))) <= set(seen)


def test_whole_passes_see_every_row_equally_often():
    source = buffered(CountingRows(), reuse=3, refill_fraction=1.0)
    seen = Counter(ids(source.next_batch(120)))
    assert seen == Counter(dict.fromkeys(map(float, range(40)), 3))
    third = ids(source.next_batch(40))
    assert sorted(third) == list(range(40, 80))


def test_rows_are_mixed_far_beyond_the_order_they_came_in():
    source = buffered(CountingRows(), capacity=2000)
    batch = torch.tensor(ids(source.next_batch(500)))
    neighbours = (batch[1:] - batch[:-1]).abs().mean()
    assert abs(neighbours - 2000 / 3) < 100
    assert batch.mean().sub(1000).abs() < 100


def test_batches_are_the_same_again_from_the_seed_and_not_from_another():
    first, again = buffered(CountingRows()), buffered(CountingRows())
    other = buffered(CountingRows(), seed=4)
    assert ids(first.next_batch(30)) == ids(again.next_batch(30))
    assert ids(first.next_batch(30)) != ids(other.next_batch(30))


def test_rows_of_one_token_stay_together():
    source = buffered(CountingRows(widths=(2, 5, 1)))
    for _ in range(9):
        first, *others = source.next_rows(13)
        assert [rows.shape[1] for rows in (first, *others)] == [2, 5, 1]
        assert all(ids(rows) == ids(first) for rows in others)


@pytest.mark.parametrize("refill", ["inline", "thread"])
@pytest.mark.parametrize("reuse", [1, 2])
@pytest.mark.parametrize("lanes", [1, 3])
def test_resume_is_exact(reuse: int, refill: str, lanes: int):
    """At the start, mid-cycle, at a refill and beyond, with a block on its way."""
    assert_resumes_exactly(
        lambda: buffered(
            {i: CountingRows(i, widths=(2, 3), delay=1e-4) for i in range(lanes)},
            reuse=reuse,
            refill=refill,
        ),
        batch=12,
        stops=(0, 1, 2, 5, 6, 11),
    )


@pytest.mark.parametrize("refill_fraction", [0.5, 1.0])
def test_rows_set_aside_never_come_and_neither_do_their_documents_again(refill_fraction: float):
    """Eleven rows, of the first two documents: the rest of the second comes once, in its pass."""
    rows = CountingRows(epoch_rows=70)
    source = buffered(rows, reserved_tokens=11, refill_fraction=refill_fraction)
    seen = Counter(row % 70 for row in ids(source.next_batch(500)))
    assert min(seen) == 11
    assert set(seen) == set(map(float, range(11, 70)))
    assert max(seen[float(row)] for row in range(11, 20)) == 1
    assert min(seen[float(row)] for row in range(20, 60)) > 3
    reserved = source.reserved_rows()
    assert reserved is not None
    assert ids(reserved) == list(range(11))


def test_only_the_first_lane_sets_rows_aside():
    source = buffered({i: CountingRows(i) for i in range(2)}, reserved_tokens=11)
    assert source.reserved_rows() is None  # before the buffer is filled
    seen = set(ids(source.next_batch(400)))
    assert {float(row) for row in range(11)}.isdisjoint(seen)
    assert {row + 1 / 16 for row in range(11)} <= seen
    alone = buffered({1: CountingRows(1)}, reserved_tokens=11)
    alone.next_batch(40)
    assert alone.reserved_rows() is None
    with pytest.raises(ValueError, match=r"`stream.reserved_tokens` must be below .*; got 40"):
        buffered(CountingRows(), reserved_tokens=40)


def test_resume_is_exact_with_rows_set_aside():
    assert_resumes_exactly(
        lambda: buffered(CountingRows(epoch_rows=70), reserved_tokens=11, reuse=2),
        batch=12,
        stops=(0, 2, 6, 11),
    )


def test_another_size_is_refused():
    small, large = buffered(CountingRows()), buffered(CountingRows(), capacity=50)
    small.next_batch(3)
    with pytest.raises(ValueError, match=r"\(\(50, 2\), 'torch.float32'\); got \(\(40, 2\)"):
        large.load_state(saved(small))


def test_more_than_the_memory_holds_is_refused():
    with pytest.raises(RuntimeError, match=r"memory of cpu; .* GB\. Lower `stream.buffer_tokens`"):
        buffered(CountingRows(), capacity=10**14)


def test_a_batch_touches_only_its_own_rows(monkeypatch: pytest.MonkeyPatch):
    """No permutation is made between refills."""
    source = buffered(CountingRows(), capacity=100)
    source.next_batch(1)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: pytest.fail("work over the buffer"))
    for _ in range(4):
        source.next_batch(10)


class CopiedElements(TorchDispatchMode):
    """Counts the elements of floating tensors that ops write."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        written = args[3] if func.overloadpacket is torch.ops.aten.index_copy_ else found
        is_new = isinstance(written, torch.Tensor) and not func.is_view
        if is_new and written.is_floating_point():
            self.n += written.numel()
        return found


def test_a_refill_copies_each_row_once():
    """The other of two copies at most is that which takes kept rows out of the forward's."""
    source = buffered(CountingRows(widths=(64,)), capacity=400)
    source.next_batch(200)
    lane = source.lanes[0]
    lane.make()
    lane.max_norm = None
    with CopiedElements() as copied:
        n = lane.n_fitting
        lane.put(n)
    assert n == 7 - 400 % 7
    assert copied.n == n * 64


@pytest.mark.parametrize("ratio", [None, 1.5])
def test_rows_of_large_norm_are_left_out_and_remembered(ratio: float | None):
    plain = buffered(CountingRows(piece=30), 60, max_norm_ratio=ratio)
    sample = plain.calibration_sample()
    limit = plain.max_norm
    if ratio is None:
        assert limit is None
        assert len(sample) == 30
        return
    assert limit == pytest.approx(14 * 2**0.5 * 1.5)
    assert len(sample) == 22
    endless = buffered(CountingRows(piece=30, epoch_rows=30), 60, max_norm_ratio=ratio)
    endless.calibration_sample()
    with pytest.raises(ValueError, match="must fill the buffer of 60 tokens once"):
        endless.next_batch(1)


def test_text_too_short_for_the_buffer_is_refused():
    source = buffered(CountingRows(epoch_rows=33))
    with pytest.raises(ValueError, match=r"buffer of 40 tokens once; .* about 35 kept tokens"):
        source.next_batch(1)


def test_warming_up_tells_how_far_it_is():
    told: list[tuple[int, int]] = []
    source = buffered({i: CountingRows(i) for i in range(2)})
    source.warm_up(lambda done, wanted: told.append((done, wanted)))
    assert told[-1] == (80, 80)
    assert all(one < other for (one, _), (other, _) in pairwise(told))


def test_a_lane_counts_documents_across_blocks():
    source = buffered(CountingRows(piece=7, per_document=10))
    source.next_batch(1)
    lane: Lane = source.lanes[0]
    assert (lane.n_rows, lane.n_squared) == (40, 4 * 10**2)
