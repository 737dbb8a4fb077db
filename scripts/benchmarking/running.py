"""Runs rows: draws inputs, checks, and only where the check is green takes the time.

Whatever goes wrong in one contender is written into its result and the run goes on, except where
the device itself no longer answers: then the rest is recorded as not run.
"""

import gc
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from . import code_rows, dictionary_rows, select_rows, update_rows
from .checking import Deviation
from .clocks import Call, Clock, Timing
from .floors import Ceilings, floor_ms, total_bytes, total_flops
from .inputs import Draw, draw_batches, draw_codes, draw_pre_acts, draw_updates, draw_weights
from .rows import OURS, Absent, Contender, Row
from .shapes import Firing, Shape

ROWS: list[Row] = [
    *select_rows.ROWS,
    *code_rows.ROWS,
    *update_rows.ROWS,
    *dictionary_rows.ROWS,
]
DRAWS: dict[str, Callable[[Draw, Shape, Firing], list[Any]]] = {
    "pre_acts": draw_pre_acts,
    "code": draw_codes,
    "update": draw_updates,
    "batch": draw_batches,
    "weights": draw_weights,
}
PEER_TOLERANCE = 0.1  # a typical row's relative error: beyond it a peer computes something else
GOAL_DEVICE = "H200"
Result = dict[str, Any]
T = TypeVar("T")


class NotRun(Exception):
    """Raised before a contender is tried; the message says why."""


@dataclass
class Run:
    """What a run needs everywhere, and what it has found."""

    clock: Clock
    device: torch.device
    device_name: str
    ceilings: Ceilings
    deadline: float  # of time.monotonic()
    report: Callable[[Result], None]
    results: list[Result]
    save: Callable[[], None]
    stopped_by: str | None = None  # why the device is lost

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        return torch.bfloat16 if self.clock.device_type == "cuda" else torch.float32


def pick_rows(ops: Sequence[str] | None) -> list[Row]:
    """Return the rows of these ops, all where None; ValueError for an op that has none."""
    known = list(dict.fromkeys(row.op for row in ROWS))
    for name in ops or ():
        if name not in known:
            raise ValueError(f"`--ops` must be among {', '.join(known)}; got {name!r}.")
    return [row for row in ROWS if ops is None or row.op in ops]


def run_shape(run: Run, shape: Shape, firings: Sequence[Firing], rows: Sequence[Row]) -> None:
    """Run all rows of a shape, each kind of inputs drawn once for each law of firing."""
    for firing in firings:
        for kind in DRAWS:
            has_firing = kind != "weights"
            chosen = [row for row in rows if row.kind == kind]
            if chosen and (has_firing or firing == firings[0]):
                _run_kind(run, shape, firing, kind, chosen)
                gc.collect()
                run.save()


def _run_kind(run: Run, shape: Shape, firing: Firing, kind: str, rows: Sequence[Row]) -> None:
    failure: Result = {}
    inputs = _attempt(run, failure, partial(_draw, run, shape, firing, kind))
    for row in rows:
        contenders = [c for c in row.contenders if run.clock.device_type in c.devices]
        groups = [contenders] if run.clock.interleaves else [[c] for c in contenders]
        for group in filter(None, groups):
            results = [_blank(row, shape, firing, contender) | failure for contender in group]
            if inputs:
                _run_group(run, row, shape, list(zip(group, results, strict=True)), inputs)
            run.results += results
            for result in results:
                run.report(result)


def _draw(run: Run, shape: Shape, firing: Firing, kind: str) -> list[Any]:
    """Return sets of inputs that depend on nothing but their names."""
    generator = torch.Generator(run.device)
    generator.manual_seed(zlib.crc32(f"{shape.name} {firing} {kind}".encode()))
    draw = Draw(run.device, run.dtype, run.clock.l2_bytes, generator)
    return DRAWS[kind](draw, shape, firing)


def _run_group(
    run: Run,
    row: Row,
    shape: Shape,
    group: Sequence[tuple[Contender, Result]],
    inputs: Sequence[Any],
) -> None:
    """Check the contenders, and time those that are right, together."""
    ready: list[tuple[Result, list[Call]]] = []
    for contender, result in group:
        work = partial(_checked_calls, run, row, contender, inputs, result)
        if calls := _attempt(run, result, work):
            ready.append((result, calls))
    if ready:
        failure: Result = {}
        may_graph = all(contender.graph for contender, _ in group)
        work = partial(run.clock.time, [calls for _, calls in ready], may_graph)
        timings = _attempt(run, failure, work)
        for slot, (result, _) in enumerate(ready):
            result.update(failure)
            if timings:
                _add_timing(run, row, shape, result, timings[slot])
    ready.clear()
    _see_whether_the_device_answers(run, group[-1][1])


def _checked_calls(
    run: Run, row: Row, contender: Contender, inputs: Sequence[Any], result: Result
) -> list[Call] | None:
    """Return one call for each set of inputs, or None where the check is red."""
    calls = [contender.prepare(inputs[0])]
    found = calls[0]()
    deviation = row.check(inputs[0], contender.read(inputs[0], found) if contender.read else found)
    del found
    result["error_over_allowed"] = _finite(deviation.over_allowed)
    result["typical_relative_error"] = _finite(deviation.typical)
    if not _is_right(contender, deviation):
        result.update(status="wrong", reason="the check is red, so there is no time")
        return None
    calls += [contender.prepare(one) for one in inputs[1:]]
    result["extra_memory_bytes"] = run.clock.extra_memory_bytes(calls[0])
    result["status"] = "ok"
    return calls


def _is_right(contender: Contender, deviation: Deviation) -> bool:
    """Ours must obey the tests' law; a peer must compute the same thing."""
    if contender.source.startswith(OURS):
        return deviation.over_allowed <= 1
    return deviation.typical <= PEER_TOLERANCE


def _blank(row: Row, shape: Shape, firing: Firing, contender: Contender) -> Result:
    return {
        "shape": shape.name,
        "op": row.op,
        "part": row.part,
        "firing": None if row.kind == "weights" else firing,
        "contender": contender.name,
        "source": contender.source,
        "status": "not run",
    }


def _add_timing(run: Run, row: Row, shape: Shape, result: Result, timing: Timing) -> None:
    work, moved = (w(shape, run.dtype.itemsize) for w in (row.work, row.moved or row.work))
    floor, seconds = floor_ms(work, run.ceilings), timing.ms / 1e3
    flops = total_flops(moved)
    result.update(
        ms=timing.ms,
        method=timing.method,
        n_samples=timing.n_samples,
        floor_ms=floor,
        over_floor=timing.ms / floor,
        gb_per_s=None if flops else total_bytes(moved) / seconds / 1e9,
        tflop_per_s=flops / seconds / 1e12 if flops else None,
    )
    goal = row.goals.get(shape.name) if GOAL_DEVICE in run.device_name else None
    if goal is not None and result["contender"] == "auto":
        result.update(goal_ms=goal, goal_met=timing.ms <= goal)


def _attempt(run: Run, result: Result, work: Callable[[], T]) -> T | None:
    """As `attempt`, unless the run is stopped or out of time."""

    def started() -> T:
        _check_that_it_may_start(run)
        return work()

    return attempt(result, started)


def attempt(result: Result, work: Callable[[], T]) -> T | None:
    """Return what `work` returns; where it raises, None, with status and reason in `result`."""
    try:
        return work()
    except NotRun as error:
        result.update(status="not run", reason=str(error))
    except Absent as error:
        result.update(status="absent", reason=str(error))
    except torch.OutOfMemoryError as error:
        result.update(status="does not fit", reason=first_line(error))
    except Exception as error:  # whatever a contender raises is its result
        result.update(status="error", reason=f"{type(error).__name__}: {first_line(error)}")
    return None


def _check_that_it_may_start(run: Run) -> None:
    if run.stopped_by:
        raise NotRun(run.stopped_by)
    if time.monotonic() > run.deadline:
        raise NotRun("out of time: give --minutes more, or fewer --shapes or --ops")


def _see_whether_the_device_answers(run: Run, result: Result) -> None:
    """Give back memory; where that fails, stop the run at the contender of `result`."""
    if run.stopped_by:
        return
    try:
        run.clock.settle()
    except RuntimeError as error:
        where = " ".join(str(result[key]) for key in ("shape", "op", "part", "contender"))
        run.stopped_by = f"the device stopped answering at {where}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def _finite(number: float) -> float | None:
    """Return the number, or None for infinity, which JSON has not."""
    return number if number < float("inf") else None
