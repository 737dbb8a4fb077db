"""How long steps take, and what memory they need besides what is kept from step to step.

Steps change what they train, so they cannot be replayed as the kernels' calls are: each runs once,
on the next set of tokens, and is timed by itself.
"""

import gc
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from .step_task import Trainee

WARM_UP_STEPS = 3  # beyond the checked ones; a captured step records its graph meanwhile


class CpuStepClock:
    """Trainees take turns, step by step, so that a noisy minute falls on all alike."""

    device_type = "cpu"
    interleaves = True
    total_bytes: int | None = None

    def __init__(self, seconds: float = 10.0, least: int = 3, most: int = 25):
        self.seconds, self.least, self.most = seconds, least, most

    def time(self, trainees: Sequence[Trainee], xs: Sequence[Tensor]) -> list[list[float]]:
        """Return the milliseconds of each trainee's steps.

        Each takes part until it has spent its seconds, but at least a few times.
        """
        samples: list[list[float]] = [[] for _ in trainees]
        for turn in range(self.most):
            for trainee, taken in zip(trainees, samples, strict=True):
                if turn >= self.least and sum(taken) >= 1e3 * self.seconds:
                    continue
                start = time.perf_counter()
                trainee.step(xs[turn % len(xs)])
                taken.append(1e3 * (time.perf_counter() - start))
        return samples

    def before_making(self) -> None:
        """Do nothing: memory is measured in a step of its own."""

    def before_training(self) -> None:
        """Do nothing: as above."""

    def extra_bytes(self, trainee: Trainee, x: Tensor) -> int:
        """Return the most that torch allocates during a step, and copies that stand beside it."""
        return peak_of_allocations(lambda: trainee.step(x)) + trainee.standing_bytes

    def settle(self) -> None:
        """Do nothing: nothing is under way."""


class CudaStepClock:
    """Events around each step; the host runs ahead as far as the step lets it."""

    device_type = "cuda"
    interleaves = False

    def __init__(
        self, cuda: Any = torch.cuda, seconds: float = 2.0, least: int = 8, most: int = 60
    ):
        self.cuda, self.seconds, self.least, self.most = cuda, seconds, least, most
        self.before = 0
        properties = cuda.get_device_properties(cuda.current_device())
        self.total_bytes: int | None = int(getattr(properties, "total_memory", 0)) or None

    def time(self, trainees: Sequence[Trainee], xs: Sequence[Tensor]) -> list[list[float]]:
        """Return the milliseconds of each trainee's steps, one trainee after the other."""
        return [self._time_one(trainee, xs) for trainee in trainees]

    def _time_one(self, trainee: Trainee, xs: Sequence[Tensor]) -> list[float]:
        for turn in range(WARM_UP_STEPS):
            trainee.step(xs[turn % len(xs)])
        estimate = sum(self._events(trainee, xs, 2)) / 2
        n_steps = round(1e3 * self.seconds / max(estimate, 1e-3))
        return self._events(trainee, xs, max(self.least, min(self.most, n_steps)))

    def _events(self, trainee: Trainee, xs: Sequence[Tensor], n_steps: int) -> list[float]:
        marks = [self.cuda.Event(enable_timing=True) for _ in range(n_steps + 1)]
        self.cuda.synchronize()
        marks[0].record()
        for turn in range(n_steps):
            trainee.step(xs[turn % len(xs)])
            marks[turn + 1].record()
        self.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(marks)]

    def before_making(self) -> None:
        """Note what is held before a trainee is made."""
        self.settle()
        self.before = self.cuda.memory_allocated()

    def before_training(self) -> None:
        """Begin to watch: making a trainee may need more than training it."""
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()

    def extra_bytes(self, trainee: Trainee, x: Tensor) -> int:  # noqa: ARG002 - as CpuStepClock
        """Return the peak since `before_training` beyond tokens, parameters and optimiser state.

        It covers the first steps: a replayed graph no longer shows what it needs.
        """
        self.cuda.synchronize()
        kept = sum(tensor.nbytes for tensor in trainee.kept())
        return max(0, self.cuda.max_memory_allocated() - self.before - kept)

    def settle(self) -> None:
        """Give back memory; raise RuntimeError where the device no longer answers."""
        gc.collect()
        self.cuda.synchronize()
        self.cuda.empty_cache()


StepClock = CpuStepClock | CudaStepClock


def peak_of_allocations(call: Any) -> int:
    """Return the most bytes that torch's CPU allocator held during a call beyond those before it.

    What the call frees of memory from before counts as free from then on.
    """
    profiler: Any = profile(use_kineto=True, profile_memory=True)  # the stubs lack its results
    with profiler:
        call()
    changes = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def load() -> list[float]:
    """Return the machine's load averages over 1, 5 and 15 minutes."""
    return [round(one, 2) for one in os.getloadavg()]
