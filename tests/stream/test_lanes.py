"""Lanes: the same batches on any number of processes that divides them."""

from __future__ import annotations

import pretended_gpu
import pytest
import torch
from toy_rows import CountingRows, buffered, ids, saved

from sae.config import StreamConfig
from sae.stream.buffered import BufferedSource
from sae.stream.source import SourceState

N_LANES = 6
CPU = torch.device("cpu")


def on(n_processes: int) -> list[BufferedSource]:
    """Return every process's source."""
    n = N_LANES // n_processes
    return [
        buffered({i: CountingRows(i) for i in range(rank * n, (rank + 1) * n)})
        for rank in range(n_processes)
    ]


def global_batches(sources: list[BufferedSource], count: int) -> list[list[float]]:
    n = 60 // len(sources)
    return [
        [number for source in sources for number in ids(source.next_batch(n))] for _ in range(count)
    ]


def merged(sources: list[BufferedSource]) -> SourceState:
    lanes, tensors = {}, {}
    for source in sources:
        state = saved(source)
        lanes |= state.position["lanes"]
        tensors |= state.tensors
    return SourceState({"lanes": lanes}, tensors)


@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_batches_do_not_depend_on_the_processes(n_processes: int):
    assert global_batches(on(n_processes), 5) == global_batches(on(6), 5)


@pytest.mark.parametrize(("before", "after"), [(6, 1), (1, 6), (2, 3), (3, 2), (6, 3)])
def test_another_number_of_processes_goes_on_with_the_same_batches(before: int, after: int):
    expected = global_batches(on(2), 9)
    first, then = on(before), on(after)
    assert global_batches(first, 4) == expected[:4]
    state = merged(first)
    for source in then:
        source.load_state(state)
    assert global_batches(then, 5) == expected[4:]


def test_the_log_says_what_share_of_all_lanes_was_masked():
    (source,) = on(1)
    source.next_batch(12)
    assert source.log_values()["masked_bos"] == 0.25


def test_lanes_that_do_not_divide_a_batch_are_refused():
    (source,) = on(1)
    with pytest.raises(ValueError, match="in multiples of the 6 lanes; got 20"):
        source.next_batch(20)


def test_no_row_comes_twice():
    seen = [number for batch in global_batches(on(3), 40) for number in batch]
    assert len(set(seen)) == len(seen)
    assert {int(number * 16) % 16 for number in seen} == set(range(N_LANES))


def test_the_norm_limit_is_that_of_all_lanes():
    source = buffered({i: CountingRows(i * 8, piece=11) for i in range(2)}, max_norm_ratio=1.2)
    source.calibration_rows()
    medians = torch.tensor([5.0, 5.5]) * 2**0.5
    assert source.max_norm == pytest.approx(float(medians.mean()) * 1.2)
    assert len({lane.max_norm for lane in source.lanes.values()}) == 1


def test_a_gpu_takes_rows_of_all_lanes_from_host_memory_without_waiting():
    """What is joined in host memory is no longer page-locked, and would be waited for."""
    streams = {i: CountingRows(i) for i in range(N_LANES)}
    cfg = StreamConfig(buffer_tokens=40, device="cpu", refill="inline")
    with pretended_gpu.pretended_gpu():
        gpu = torch.device("cuda")
        source = BufferedSource(streams, cfg, context_size=8, seed=0, device=gpu)
        found = [source.next_batch(60)]
        with pretended_gpu.in_step():
            found.append(source.next_batch(60))
        assert pretended_gpu.waits == []
        assert all(isinstance(rows, pretended_gpu.Gpu) for rows in found)
        found = [rows.cpu() for rows in found]
    expected = BufferedSource(
        {i: CountingRows(i) for i in range(N_LANES)}, cfg, context_size=8, seed=0, device=CPU
    )
    assert all(torch.equal(rows, expected.next_batch(60)) for rows in found)
