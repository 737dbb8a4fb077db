"""What a captured function does, call by call, with stand-ins for CUDA's graphs."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sae.train.capture import EAGER_CALLS, MOST_KINDS, Captured


class Graphs:
    """Stands in for torch.cuda: while capturing, what is called does not happen until replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False):
        self.n_captures = self.n_replays = 0
        self.is_capturing = False
        outer = self

        class Graph:
            def replay(self) -> None:
                outer.n_replays += 1
                self.again()

        @contextmanager
        def capturing(graph, pool, capture_error_mode):
            assert pool == "pool"
            assert capture_error_mode == "thread_local"  # a refilling thread may allocate
            outer.is_capturing, outer.current = True, graph
            outer.n_captures += 1
            yield
            outer.is_capturing = False
            if fails:
                raise RuntimeError("operation not permitted when stream is capturing")

        stream = SimpleNamespace(wait_stream=lambda _: None)
        for name, stand_in in {
            "CUDAGraph": Graph,
            "graph": capturing,
            "graph_pool_handle": lambda: "pool",
            "Stream": lambda _: stream,
            "stream": lambda _: nullcontext(),
            "current_stream": lambda: stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def function(self, total: Tensor):
        """Return a function that adds its input to `total` when it really runs."""

        def add(x: Tensor, y: Tensor, given: int) -> None:
            def run() -> None:
                total.add_(given * (x.sum() + y.sum()))

            if self.is_capturing:
                self.current.again = run
            else:
                run()

        return add


def calls() -> list[tuple[Tensor, Tensor]]:
    """Inputs of two kinds of shape, in turns."""
    return [(torch.full((3,), float(i)), torch.ones(i % 2, 2)) for i in range(1, 13)]


def test_each_call_happens_once_on_its_own_inputs(monkeypatch: pytest.MonkeyPatch):
    graphs, total = Graphs(monkeypatch), torch.zeros(())
    captured = Captured(graphs.function(total), torch.device("cuda"))
    expected = 0.0
    for x, y in calls():
        for given in (1, 2):
            captured(x, y, given=given)
            expected += given * float(x.sum() + y.sum())
            assert float(total) == expected
    assert graphs.n_captures == 4  # one a kind of shape and a number given
    assert graphs.n_replays == 24 - 4 * EAGER_CALLS


def test_a_failed_capture_warns_once_and_goes_on(monkeypatch: pytest.MonkeyPatch):
    graphs, total = Graphs(monkeypatch, fails=True), torch.zeros(())
    captured = Captured(graphs.function(total), torch.device("cuda"))

    def call_all() -> None:
        for x, y in calls():
            captured(x, y, given=1)

    with pytest.warns(UserWarning, match=r"could not be captured .*not permitted") as warned:
        call_all()
    assert len(warned) == graphs.n_captures == 1
    assert float(total) == sum(float(x.sum() + y.sum()) for x, y in calls())


def test_on_a_cpu_it_is_a_plain_call():
    total = torch.zeros(())
    captured = Captured(lambda x, given: total.add_(x.sum() + given), torch.device("cpu"))
    for _ in range(5):
        captured(torch.ones(2), given=1)
    assert float(total) == 15


def test_what_never_comes_again_is_never_captured_and_forgotten(monkeypatch: pytest.MonkeyPatch):
    """A schedule's values pass; what they were given with in between is still captured."""
    graphs, total = Graphs(monkeypatch), torch.zeros(())
    captured = Captured(graphs.function(total), torch.device("cuda"))
    one, empty, expected = torch.ones(3), torch.ones(0, 2), 0.0
    for given in range(2, 4 * MOST_KINDS):
        for number in (1, given):
            captured(one, empty, given=number)
            expected += 3 * number
    assert float(total) == expected
    assert graphs.n_captures == 1
    assert len(captured._recordings) == MOST_KINDS
    assert len(captured._places) == 2


def test_inputs_of_one_shape_share_memory(monkeypatch: pytest.MonkeyPatch):
    captured = Captured(Graphs(monkeypatch).function(torch.zeros(())), torch.device("cuda"))
    for given in (1, 2):
        captured(torch.ones(3), torch.ones(3), given=given)
    one, other = (recording.inputs for recording in captured._recordings.values())
    assert [x.data_ptr() for x in one] == [x.data_ptr() for x in other]
    assert one[0].data_ptr() != one[1].data_ptr()
