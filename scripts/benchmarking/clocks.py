"""How long calls take: medians, by CUDA-graph replay or do_bench on a GPU, interleaved on a CPU.

A clock is given, for each contender, one call for each set of inputs, and turns through them.
"""

import gc
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import median
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
GRAPH_MS = 5.0  # of work in one graph, so that starting it does not count
MAX_CALLS_A_GRAPH = 400
DEFAULT_L2_BYTES = 50 * 2**20  # an H100's and H200's, where this PyTorch does not tell


class Timing(NamedTuple):
    """A median over `n_samples` and how it was taken."""

    ms: float
    method: str
    n_samples: int


class CpuClock:
    """Contenders take turns, call by call, so that a disturbance falls on all alike."""

    device_type = "cpu"
    interleaves = True
    l2_bytes = 0

    def __init__(
        self,
        seconds: float = 0.25,
        most: int = 25,
        statistic: Callable[[Sequence[float]], float] = median,
    ):
        self.seconds, self.most, self.statistic = seconds, most, statistic

    def time(self, contenders: Sequence[Sequence[Call]], graph: bool = True) -> list[Timing]:  # noqa: ARG002
        """Return each contender's time; each takes part until it has spent its seconds."""
        samples: list[list[float]] = [[] for _ in contenders]
        for turn in range(self.most):
            for calls, taken in zip(contenders, samples, strict=True):
                if sum(taken) >= 1e3 * self.seconds:
                    continue
                start = time.perf_counter()
                calls[turn % len(calls)]()
                taken.append(1e3 * (time.perf_counter() - start))
        return [Timing(self.statistic(taken), "interleaved", len(taken)) for taken in samples]

    def extra_memory_bytes(self, call: Call) -> int | None:  # noqa: ARG002 - as CudaClock has it
        """Return None: a CPU's allocator keeps no count."""
        return None

    def settle(self) -> None:
        """Do nothing: nothing is under way."""


class CudaClock:
    """Graph replay where a call can be captured, else triton.testing.do_bench.

    Everything runs on one side stream (enter `on_stream`), since a backward runs on the stream of
    its forward, and the default stream cannot be captured. A capture that fails leaves PyTorch's
    allocator in doubt, so calls that wait for the GPU are found before, without a capture, and
    after one failure no further capture is tried.
    """

    device_type = "cuda"
    interleaves = False

    def __init__(
        self,
        cuda: Any = torch.cuda,
        do_bench: Callable[..., Any] | None = None,
        use_graphs: bool = True,
        budget_ms: float = 100.0,
    ):
        self.cuda = cuda
        self.do_bench = do_bench or _triton_do_bench()
        self.use_graphs = use_graphs
        self.budget_ms = budget_ms
        self.notes: list[str] = []
        self.stream = cuda.Stream()
        properties = cuda.get_device_properties(cuda.current_device())
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or DEFAULT_L2_BYTES

    def on_stream(self) -> Any:
        """Return the context in which all work must run."""
        return self.cuda.stream(self.stream)

    def time(self, contenders: Sequence[Sequence[Call]], graph: bool = True) -> list[Timing]:
        """Return each contender's median; `graph=False` keeps to do_bench."""
        return [self._time_one(calls, graph) for calls in contenders]

    def _time_one(self, calls: Sequence[Call], graph: bool) -> Timing:
        if graph and self.use_graphs and self._never_waits(calls):
            try:
                return self._replayed(calls, self._estimate_ms(calls))
            except torch.OutOfMemoryError:
                pass  # a graph has memory of its own; do_bench makes do with less
            except RuntimeError as error:
                self.use_graphs = False
                self.notes.append(f"No graphs from here on, a capture failed: {error}")
                self.cuda.synchronize()
        turns = cycle(calls)
        ms = self.do_bench(
            lambda: next(turns)(), warmup=25, rep=self.budget_ms, return_mode="median"
        )
        return Timing(ms, "do_bench", 0)

    def _never_waits(self, calls: Sequence[Call]) -> bool:
        """Say whether the calls run without waiting for the device; each is warmed up by it."""
        for call in calls:
            call()
        self.cuda.synchronize()
        self.cuda.set_sync_debug_mode("error")
        try:
            for call in calls:
                call()
        except RuntimeError:
            return False
        finally:
            self.cuda.set_sync_debug_mode("default")
        return True

    def _estimate_ms(self, calls: Sequence[Call]) -> float:
        """Return about how long a call takes, launch gaps included."""
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) / len(calls), 1e-3)

    def _replayed(self, calls: Sequence[Call], estimate_ms: float) -> Timing:
        pass_ms = estimate_ms * len(calls)
        n_passes = max(1, min(round(GRAPH_MS / pass_ms), MAX_CALLS_A_GRAPH // len(calls)))
        graph = self.cuda.CUDAGraph()
        gc.disable()  # an object freed while capturing could synchronise
        try:
            with self.cuda.graph(graph, stream=self.stream):
                for _ in range(n_passes):
                    for call in calls:
                        call()
        finally:
            gc.enable()
        n_replays = max(3, min(50, round(self.budget_ms / (n_passes * pass_ms))))
        graph.replay()
        samples = [self._one_replay_ms(graph) for _ in range(n_replays)]
        graph.reset()
        return Timing(median(samples) / (n_passes * len(calls)), "graph", n_replays)

    def _one_replay_ms(self, graph: Any) -> float:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def extra_memory_bytes(self, call: Call) -> int | None:
        """Return the most memory that a call holds beyond what stood before it, its result too."""
        self.cuda.synchronize()
        before = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        result = call()
        self.cuda.synchronize()
        del result
        return self.cuda.max_memory_allocated() - before

    def settle(self) -> None:
        """Give back memory; raise RuntimeError where the device no longer answers."""
        self.cuda.synchronize()
        if self.use_graphs:  # after a failed capture the allocator refuses
            self.cuda.empty_cache()


Clock = CpuClock | CudaClock


def _triton_do_bench() -> Callable[..., Any]:
    from triton.testing import do_bench

    return do_bench
