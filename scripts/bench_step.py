"""Measure whole training steps: ours, what others run, and the least that the device allows.

    python scripts/bench_step.py [--shapes A C] [--only "ours, fused" eai-sparsify] [--quick]
    python scripts/bench_step.py --growth        # step time against d_sae, k and n, with a plot

On a GPU the shapes are A to D, on a CPU small and wide. The results go to docs/benchmarks/, whose
README says how they are made and how to read them.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bench_kernels import make_clock, pick_device
from benchmarking import machine
from benchmarking.ceilings import measure_ceilings
from benchmarking.clocks import Clock, CudaClock
from benchmarking.floors import Ceilings
from benchmarking.results import free_path
from benchmarking.shapes import FIRINGS
from benchmarking.step_clocks import CpuStepClock, CudaStepClock, StepClock
from benchmarking.step_contenders import UNIT, StepContender, contenders
from benchmarking.step_growth import Growth, run_growth, save_growth
from benchmarking.step_results import save_steps, steps_page
from benchmarking.step_running import StepRun, run_step_shape
from benchmarking.step_shapes import GROWTH_BASES, QUICK_GROWTH_BASE, pick_step_shapes

DEFAULT_MINUTES = {"cuda": 9.0, "cpu": 30.0}
PEER_PACKAGES = ("sae-lens", "dictionary-learning")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; return the path of its JSON."""
    start = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    device = pick_device()
    clock = make_clock(device, options.quick, True)
    step_clock = make_step_clock(clock, options.quick)
    try:
        shapes = pick_step_shapes(options.shapes, step_clock.device_type, options.quick)
        rows = pick_contenders(options.only, step_clock.device_type)
    except ValueError as error:
        parser.error(str(error))
    document = _blank_document(device, options)
    path = free_path(options.out, f"{document['date']}-{machine.slug(device)}-{_kind(options)}")
    with clock.on_stream() if isinstance(clock, CudaClock) else nullcontext():
        ceilings = measure_ceilings(clock, device)
    document["ceilings"] = ceilings._asdict()
    _print_head(document)
    minutes = options.minutes or DEFAULT_MINUTES[step_clock.device_type]
    deadline = start + 60 * minutes
    if options.growth:
        return _growth(path, document, step_clock, device, ceilings, deadline, options.quick)
    document |= {"shapes": [shape._asdict() for shape in shapes], "loads": {}, "rows": []}

    def save() -> None:
        document["seconds"] = round(time.monotonic() - start, 1)
        save_steps(path, document)

    run = StepRun(
        step_clock,
        device,
        document["machine"]["device"],
        ceilings,
        deadline,
        _say,
        document["rows"],
        document["loads"],
        save,
    )
    for shape in shapes:
        run_step_shape(run, shape, options.firing, rows)
    document["complete"] = True
    document["gpu_after"] = machine.gpu_state() if device.type == "cuda" else None
    save()
    print(f"\n{steps_page(document)}\nWritten: {path} and {path.with_suffix('.md').name}")
    return path


def make_step_clock(clock: Clock, quick: bool) -> StepClock:
    """Return the clock of whole steps that goes with the kernels' clock."""
    if isinstance(clock, CudaClock):
        return CudaStepClock(clock.cuda, seconds=0.5 if quick else 2.0)
    return CpuStepClock(seconds=0.2, least=2) if quick else CpuStepClock()


def pick_contenders(names: Sequence[str] | None, kind: str) -> list[StepContender]:
    """Return the rows of these names and the unit, all where None; ValueError for an unknown."""
    rows = contenders(kind)
    known = [row.name for row in rows]
    for name in names or ():
        if name not in known:
            raise ValueError(f"`--only` must be among {', '.join(map(repr, known))}; got {name!r}.")
    return [row for row in rows if names is None or row.name in (UNIT, *names)]


def _growth(
    path: Path,
    document: dict[str, Any],
    clock: StepClock,
    device: torch.device,
    ceilings: Ceilings,
    deadline: float,
    quick: bool,
) -> Path:
    """Measure how the cost grows, and write it."""
    start = time.monotonic()
    base = QUICK_GROWTH_BASE if quick else GROWTH_BASES[clock.device_type]
    document |= {"base": base._asdict(), "points": []}
    if isinstance(clock, CpuStepClock):
        clock.seconds, clock.least = min(clock.seconds, 2.0), min(clock.least, 3)
    run_growth(Growth(clock, device, ceilings, deadline, _say, document["points"]), base)
    document["complete"] = time.monotonic() <= deadline
    document["seconds"] = round(time.monotonic() - start, 1)
    save_growth(path, document)
    print(f"\nWritten: {path}, and beside it a page and a plot")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", help="default: all (A to D; on a CPU small, wide)")
    parser.add_argument("--only", nargs="+", help="names of rows; default: all")
    parser.add_argument(
        "--out", type=Path, default=machine.ROOT / "docs" / "benchmarks", help="where results go"
    )
    parser.add_argument("--firing", choices=FIRINGS, default="uniform", help="how latents fire")
    parser.add_argument(
        "--growth", action="store_true", help="measure step time against d_sae, k and n instead"
    )
    parser.add_argument("--quick", action="store_true", help="one tiny shape, few samples")
    parser.add_argument("--minutes", type=float, help="no row starts later (GPU 9, CPU 30)")
    parser.add_argument("--commit", help="the commit, where the code is not in its git repository")
    return parser


def _kind(options: argparse.Namespace) -> str:
    return "growth" if options.growth else "step"


def _blank_document(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    found = machine.describe(device, options.commit)
    packages = {name: machine.package_version(name) for name in PEER_PACKAGES}
    found["packages"] = {**found["packages"], **packages}  # type: ignore[dict-item]
    firing = "uniform" if options.growth else options.firing
    return {
        "complete": False,
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(),
        "machine": found,
        "gpu_after": None,
        "inputs": f"float32 tokens, at least three sets in turn; latents fire at {firing} rates",
        "notes": [],
        "ceilings": None,
        "seconds": None,
    }


def _command() -> str:
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = [f"OMP_NUM_THREADS={threads}"] if threads else []
    return " ".join([*prefix, "python scripts/bench_step.py", shlex.join(sys.argv[1:])]).rstrip()


def _print_head(document: dict[str, Any]) -> None:
    for name, fact in {**document["machine"], **document["ceilings"]}.items():
        print(f"{name}: {fact}")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
