"""Runs a shape's rows: makes each trainee, checks it, and only if it is right takes the time.

Whatever goes wrong in one is written into its row, and the run goes on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import Any

import torch

from .floors import Ceilings, floor_ms
from .running import NotRun, Result, attempt
from .shapes import Firing, Shape
from .step_checking import Reference, deviation, is_right, losses_of
from .step_clocks import StepClock, load
from .step_contenders import (
    CPU_GOALS,
    FUSED,
    H200_GOALS,
    UNIT,
    UNTRAINED,
    Goal,
    StepContender,
    least_bytes,
    n_dead_in,
)
from .step_task import Task, Trainee, draw_task

GOAL_DEVICE = "H200"


@dataclass
class StepRun:
    """What a run needs everywhere, and what it has found."""

    clock: StepClock
    device: torch.device
    device_name: str
    ceilings: Ceilings
    deadline: float  # of time.monotonic()
    report: Callable[[str], None]
    results: list[Result]
    loads: dict[str, Any]
    save: Callable[[], None]

    @property
    def goals(self) -> dict[tuple[str, str], Goal]:
        """The goals that were set for this device."""
        if self.clock.device_type == "cpu":
            return CPU_GOALS
        return H200_GOALS if GOAL_DEVICE in self.device_name else {}


def run_step_shape(
    run: StepRun, shape: Shape, firing: Firing, contenders: Sequence[StepContender]
) -> None:
    """Run all rows of a shape: together where the clock interleaves, else one by one."""
    before = load()
    task = draw_task(shape, run.device, run.clock.device_type, firing)
    reference = Reference(task, run.clock.total_bytes)
    together = run.clock.interleaves
    groups = [list(contenders)] if together else [[contender] for contender in contenders]
    for group in groups:
        results = [_blank(run, shape, firing, contender) for contender in group]
        run.results += results
        _run_group(run, task, reference, list(zip(group, results, strict=True)))
        relate(run.results, run.goals)
        for result in results:
            run.report(one_line(result))
        run.loads[shape.name] = {"before": before, "after": load()}
        run.save()


def _run_group(
    run: StepRun,
    task: Task,
    reference: Reference,
    group: Sequence[tuple[StepContender, Result]],
) -> None:
    """Check the contenders, and time those that are right, in turns."""
    ready: list[tuple[StepContender, Result, Trainee]] = []
    for contender, result in group:
        trainee = attempt(result, partial(_checked, run, task, reference, contender, result))
        if trainee:
            ready.append((contender, result, trainee))
            run.report(f"{task.shape.name} {contender.name}: ready")
    failure: Result = {}
    trainees = [trainee for *_, trainee in ready]
    samples = attempt(failure, partial(run.clock.time, trainees, task.xs))
    for slot, (contender, result, _) in enumerate(ready):
        result.update(failure)
        if samples:
            _add_timing(run, task.shape, contender, result, samples[slot])
    ready.clear()
    trainees.clear()
    run.clock.settle()


def _checked(
    run: StepRun, task: Task, reference: Reference, contender: StepContender, result: Result
) -> Trainee | None:
    """Return a trainee that has made its first steps, or None where the check is red.

    After the deadline none is made; those that were made before are timed.
    """
    if time.monotonic() > run.deadline:
        raise NotRun("out of time: give --minutes more, or fewer --shapes or rows with --only")
    needed, there = least_bytes(contender, task.shape), run.clock.total_bytes
    if there and needed > there:
        message = f"it needs {needed / 1e9:.0f} GB at least, of {there / 1e9:.0f}"
        raise torch.OutOfMemoryError(message)
    expected = [] if contender.name in UNTRAINED else reference.losses(contender.with_auxk)
    run.clock.before_making()
    trainee = contender.make(task)
    run.clock.before_training()
    if expected:
        found = losses_of(trainee, task)
        result["losses"], result["expected_losses"] = found, expected
        result["loss_deviation"] = deviation(expected[: contender.n_checked], found)
        if not is_right(contender, result["loss_deviation"]):
            result.update(status="wrong", reason="the check is red, so there is no time")
            return None
        result["extra_memory_bytes"] = run.clock.extra_bytes(trainee, task.xs[0])
    trainee.step(task.xs[-1])
    result["status"] = "ok"
    return trainee


def _blank(run: StepRun, shape: Shape, firing: Firing, contender: StepContender) -> Result:
    return {
        "shape": shape.name,
        "firing": firing,
        "contender": contender.name,
        "source": contender.source,
        "n_dead": n_dead_in(contender, shape, run.clock.device_type),
        "status": "not run",
    }


def _add_timing(
    run: StepRun, shape: Shape, contender: StepContender, result: Result, samples: list[float]
) -> None:
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    result.update(ms=middle, ms_quartiles=[low, high], n_samples=len(samples), samples=samples)
    if contender.work is not None:
        floor = floor_ms(contender.work(shape, result["n_dead"]), run.ceilings)
        result.update(floor_ms=floor, over_floor=middle / floor, floor_share=floor / middle)


def relate(rows: Sequence[Result], goals: dict[tuple[str, str], Goal]) -> None:
    """Give every timed row its time over the unit's and over our fused step's, and its goal."""
    bases = {(row["shape"], row["contender"]): row["ms"] for row in rows if "ms" in row}
    for row in rows:
        if "ms" not in row:
            continue
        for key, name in (("over_unit", UNIT), ("over_fused", FUSED)):
            if base := bases.get((row["shape"], name)):
                row[key] = row["ms"] / base
        goal = goals.get((row["contender"], row["shape"]))
        if goal and goal.of in row:
            row.update(goal=str(goal), goal_met=goal.is_met(row[goal.of]))


def one_line(row: Result) -> str:
    """Return a row for a terminal."""
    where = f"{row['shape']} {row['contender']}"
    if "ms" not in row:
        return f"{where}: {row['status']} {row.get('reason', '')}".rstrip()
    unit = f", {row['over_unit']:.2f}× the matmul" if "over_unit" in row else ""
    return f"{where}: {row['ms']:.4g} ms{unit}"
