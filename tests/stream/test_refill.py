"""Filling by a thread: the same batches, however fast it is, and no hang when it fails."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_rows import CountingRows, buffered, ids, saved

from sae.stream.buffer import ShuffleBuffer
from sae.stream.refill import ThreadRefill


@given(
    reuse=st.integers(1, 3),
    refill_fraction=st.sampled_from([0.25, 0.5, 1.0]),
    piece=st.integers(1, 50),
    lanes=st.sampled_from([1, 2]),
)
@settings(max_examples=15, deadline=None)
def test_a_thread_gives_the_batches_that_the_trainer_would(reuse, refill_fraction, piece, lanes):
    def source(refill: str):
        streams = {i: CountingRows(i, piece=piece, delay=1e-4) for i in range(lanes)}
        return buffered(streams, reuse=reuse, refill_fraction=refill_fraction, refill=refill)

    inline, threaded = source("inline"), source("thread")
    for _ in range(8):
        assert ids(inline.next_batch(14)) == ids(threaded.next_batch(14))
    threaded.close()


def test_the_thread_fills_while_nobody_waits():
    rows = CountingRows(piece=5)
    source = buffered(rows, capacity=40, refill="thread")
    source.next_batch(15)
    deadline = time.monotonic() + 5
    while source.lanes[0].buffer.room and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.lanes[0].buffer.written == 15
    time.sleep(0.05)
    assert rows.made - 55 <= 5  # and it makes no more than one block ahead
    source.close()


def test_what_the_thread_meets_ends_the_run_with_its_traceback():
    source = buffered(CountingRows(breaks_at=12), refill="thread")
    with pytest.raises(OSError, match="the disk went away") as raised:
        source.next_batch(500)
    assert any(entry.name == "next_block" for entry in raised.traceback)
    source.close()


def test_a_thread_that_is_gone_is_no_hang():
    source = buffered(CountingRows(), refill="thread")
    source.next_batch(1)
    refill = source.refill
    assert isinstance(refill, ThreadRefill)
    refill.close()
    with pytest.raises(RuntimeError, match="the thread that fills the shuffle buffer must live"):
        source.next_batch(500)


def test_the_thread_counts_no_slots_while_a_cycle_turns(monkeypatch: pytest.MonkeyPatch):
    """Between the numbers of two cycles, a buffer seems to have room that it has not."""
    source = buffered(CountingRows(), refill="thread")
    refill, lane = source.refill, source.lanes[0]
    assert isinstance(refill, ThreadRefill)
    counted, room = threading.Event(), ShuffleBuffer.room

    def noted(buffer: ShuffleBuffer) -> int:
        counted.set()
        assert room.fget is not None
        return room.fget(buffer)

    monkeypatch.setattr(ShuffleBuffer, "room", property(noted))
    mover = threading.Thread(target=refill._move, args=(lane,))
    with refill._changed:  # as `turn` holds it
        mover.start()
        assert not counted.wait(0.2)
    mover.join(5)
    assert counted.is_set()
    assert lane.buffer.written == 7


def test_closing_ends_the_thread():
    before = threading.active_count()
    source = buffered(CountingRows(), refill="thread")
    source.next_batch(5)
    assert threading.active_count() == before + 1
    source.close()
    assert threading.active_count() == before


def test_a_state_is_whole_while_the_thread_works():
    """Taken again and again: what is in the file is always what the position says."""
    source = buffered(CountingRows(delay=2e-4), capacity=200, refill="thread")
    for _ in range(30):
        source.next_batch(9)
        state = saved(source)
        lane = state.position["lanes"]["0"]
        put = 200 + (lane["buffer"]["cycle"] * 100 + lane["buffer"]["written"])
        pending = state.tensors.get("lane_0.pending.0", torch.empty(0, 2))
        assert lane["stream"]["made"] == put + len(pending)
        if len(pending):
            assert ids(pending)[0] == put
    source.close()


def test_waiting_is_measured():
    slow = buffered(CountingRows(delay=0.02, piece=5), refill="thread")
    slow.warm_up(lambda *_: None)
    for _ in range(10):
        slow.next_batch(20)
    assert 0.5 < slow.log_values()["wait_share"] <= 1
    time.sleep(0.3)
    assert slow.log_values()["wait_share"] < 0.05
    slow.close()


def test_what_is_copied_in_a_pause_is_done_before_the_thread_takes_its_memory():
    source = buffered(CountingRows(), refill="thread")
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in ("finish", "go_on")}
    source.refill._streams = SimpleNamespace(**steps)
    with source.refill.paused():
        order.append("copies")
    assert order == ["finish", "copies", "go_on"]
