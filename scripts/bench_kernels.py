"""Measure the kernels against what the device can do and against what others run.

    python scripts/bench_kernels.py [--shapes A B] [--ops topk sparse_decode] [--quick] [--out DIR]

One process, one command, under ten minutes on an H200. Without a GPU it measures small shapes. The
results go to docs/benchmarks/, whose README says how they are made and how to read them.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from benchmarking import machine
from benchmarking.ceilings import measure_ceilings
from benchmarking.clocks import Clock, CpuClock, CudaClock
from benchmarking.floors import Ceilings
from benchmarking.results import as_markdown, compare_with_ours, free_path, one_line, save
from benchmarking.running import Run, pick_rows, run_shape
from benchmarking.shapes import FIRINGS, Shape, pick_shapes

CPU_NOTE = "CPU: small shapes, the Triton kernels did not run."
DEFAULT_MINUTES = 9.0


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; return the path of its JSON."""
    start = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    device = pick_device()
    try:
        shapes = pick_shapes(options.shapes, device.type)
        rows = pick_rows(options.ops)
    except ValueError as error:
        parser.error(str(error))
    clock = make_clock(device, options.quick, not options.no_graphs)
    if options.quick:
        shapes = shapes if options.shapes else shapes[:1]
    firings = FIRINGS[-1:] if options.quick else FIRINGS
    document = _blank_document(device, options, shapes, clock)
    path = free_path(options.out, f"{document['date']}-{machine.slug(device)}-kernels")
    with clock.on_stream() if isinstance(clock, CudaClock) else nullcontext():
        ceilings = measure_ceilings(clock, device)
        document["ceilings"] = ceilings._asdict()
        _print_head(document, ceilings)
        run = Run(
            clock,
            device,
            document["machine"]["device"],
            ceilings,
            start + 60 * options.minutes,
            lambda result: print(one_line(result), flush=True),
            document["rows"],
            lambda: _save(path, document, start),
        )
        for shape in shapes:
            run_shape(run, shape, firings, rows)
    document["complete"] = True
    document["gpu_after"] = machine.gpu_state() if device.type == "cuda" else None
    _save(path, document, start)
    print(f"\n{as_markdown(document)}\nWritten: {path} and {path.with_suffix('.md').name}")
    return path


def pick_device() -> torch.device:
    """Return the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_clock(device: torch.device, quick: bool, use_graphs: bool) -> Clock:
    """Return the clock of this device."""
    if device.type == "cuda":
        return CudaClock(use_graphs=use_graphs, budget_ms=30.0 if quick else 100.0)
    return CpuClock(seconds=0.1 if quick else 0.25)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_KeepLines)
    parser.add_argument("--shapes", nargs="+", help="default: all (A to D; on a CPU small, wide)")
    parser.add_argument("--ops", nargs="+", help="default: all")
    parser.add_argument(
        "--out", type=Path, default=machine.ROOT / "docs" / "benchmarks", help="where results go"
    )
    parser.add_argument(
        "--quick", action="store_true", help="first shape, log-normal firing, few samples"
    )
    parser.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES, help="no row starts later than this"
    )
    parser.add_argument(
        "--no-graphs", action="store_true", help="time with do_bench alone, without CUDA graphs"
    )
    parser.add_argument("--commit", help="the commit, where the code is not in its git repository")
    return parser


class _KeepLines(argparse.RawDescriptionHelpFormatter):
    """Leaves the description's lines as they are."""


def _blank_document(
    device: torch.device, options: argparse.Namespace, shapes: Sequence[Shape], clock: Clock
) -> dict[str, Any]:
    on_gpu = clock.device_type == "cuda"
    l2 = ", together larger than L2" if on_gpu else ""
    return {
        "complete": False,
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(),
        "machine": machine.describe(device, options.commit),
        "gpu_after": None,
        "inputs": f"{'bfloat16' if on_gpu else 'float32'}, at least three sets in turn{l2}",
        "notes": clock.notes if isinstance(clock, CudaClock) else [CPU_NOTE],
        "shapes": [shape._asdict() for shape in shapes],
        "ceilings": None,
        "seconds": None,
        "rows": [],
    }


def _command() -> str:
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = [f"OMP_NUM_THREADS={threads}"] if threads else []
    return " ".join([*prefix, "python scripts/bench_kernels.py", *sys.argv[1:]])


def _print_head(document: dict[str, Any], ceilings: Ceilings) -> None:
    for note in document["notes"]:
        print(note)
    for name, fact in {**document["machine"], **ceilings._asdict()}.items():
        print(f"{name}: {fact}")


def _save(path: Path, document: dict[str, Any], start: float) -> None:
    compare_with_ours(document["rows"])
    document["seconds"] = round(time.monotonic() - start, 1)
    save(path, document)


if __name__ == "__main__":
    main()
