"""Replaying a function of tensors as a CUDA graph: one launch where there were dozens.

A graph repeats the same kernels on the same memory. So the function must only change tensors in
place, never wait for the device, and take whatever varies (a learning rate, a step's number) as
tensors that stay where they are.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

# Before the capture: kernels compile and libraries set up their workspaces in the first calls.
EAGER_CALLS = 2
# Kinds of calls that are kept. What schedules say of a step may never come again, and is forgotten.
MOST_KINDS = 8


@dataclass
class _Recording:
    """What belongs to one tuple of input shapes, and what was given besides."""

    inputs: tuple[Tensor, ...]  # the memory that the graph reads
    n_calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class Captured:
    """Call `function` on tensors; on a GPU from the third call with given shapes on as a graph.

    All graphs share one pool of memory, and inputs of one shape one place: they never run at the
    same time. Where the capture fails, a warning says so and the function goes on being called as
    it is.
    """

    def __init__(self, function: Callable[..., None], device: torch.device):
        self.function, self.is_off = function, device.type != "cuda"
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._places: dict[Hashable, Tensor] = {}
        self._pool = None if self.is_off else torch.cuda.graph_pool_handle()
        self._side = None if self.is_off else torch.cuda.Stream(device)

    def __call__(self, *inputs: Tensor, given: Hashable) -> None:
        """Run the function once; `given`, passed on by its name, is part of what is captured."""
        if self.is_off:
            self.function(*inputs, given=given)
            return
        recording = self._recording(inputs, given)
        for kept, x in zip(recording.inputs, inputs, strict=True):
            kept.copy_(x, non_blocking=True)
        if recording.graph is None and recording.n_calls >= EAGER_CALLS:
            recording.graph = self._capture(recording.inputs, given)
        recording.n_calls += 1
        if recording.graph is not None:
            recording.graph.replay()
        else:
            self._run_aside(recording.inputs, given)

    def _recording(self, inputs: tuple[Tensor, ...], given: Hashable) -> _Recording:
        """Return what is kept of this kind of call; the kind that was longest unused makes room."""
        key = (given, *(x.shape for x in inputs))
        if key not in self._recordings:
            places = tuple(self._place(i, x) for i, x in enumerate(inputs))
            self._recordings[key] = _Recording(places)
            if len(self._recordings) > MOST_KINDS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        return self._recordings[key]

    def _place(self, number: int, x: Tensor) -> Tensor:
        """Return the memory that graphs read input `number` from where it has the shape of x."""
        return self._places.setdefault((number, x.shape), torch.empty_like(x))

    def _run_aside(self, inputs: tuple[Tensor, ...], given: Hashable) -> None:
        """Run on another stream, as what is captured may not have run on the default one alone."""
        assert self._side is not None
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self.function(*inputs, given=given)
        torch.cuda.current_stream().wait_stream(self._side)

    def _capture(self, inputs: tuple[Tensor, ...], given: Hashable) -> torch.cuda.CUDAGraph | None:
        """Record the function without running it."""
        if self.is_off:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (the buffer's) may allocate meanwhile; theirs is not captured.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self.function(*inputs, given=given)
        except RuntimeError as error:
            self.is_off = True
            warnings.warn(
                f"The training step could not be captured as a CUDA graph ({error}); it runs "
                "uncaptured, with the same results, slower where the dictionary is small.",
                stacklevel=2,
            )
            return None
        return graph
