"""Compile the kernels of sae_kernels for GPUs that are not here, and gate what the compiler made.

    python scripts/compile_kernels.py [--arch 80 90 100] [--ops topk …] [--shapes A C] [--json FILE]

Each op's launchers run on meta tensors of the reference shapes; their launches are recorded and
compiled with just the types, constants and alignments that Triton would find in them, by Triton's
own binder and compiler. The machine code is then read with cuobjdump, which the wheel brings.

The gate, a rule a line; a row that breaks one is refused, and the exit code is 1:
compiles       Triton and ptxas accept the kernel
spills         no loads from or stores to local memory: registers suffice
shared memory  fits into what a block of that GPU can have
wide loads     where rows are aligned, a kernel that streams them loads 16 bytes a thread
grid           at most 2³¹ − 1 programs on its first axis and 65535 on the others
atomics        none on global memory: every op promises the same bits on every run

To gate a new op: a function below that runs its launchers, and its row in CASES.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_kernels.batch_selection import launch_batch_topk
from sae_kernels.decode import launch_decode, launch_values_grad
from sae_kernels.decode_loss import launch_decode_loss
from sae_kernels.fused_update import (
    AdamScalars,
    Code,
    Dictionary,
    Gradients,
    RowGradients,
    launch_update,
)
from sae_kernels.launching import HAS_TRITON, Launch, record_launches
from sae_kernels.moments import MomentFormat, new_moments
from sae_kernels.row_topk import launch_topk
from sae_kernels.segments import by_latent, launch_segment_sums
from sae_kernels.threshold_selection import launch_marks, launch_pairs

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # what a block can have
GRID = (2**31 - 1, 65_535, 65_535)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class Shape(NamedTuple):
    """Sizes of a step: tokens, width, latents, active latents a token."""

    n: int
    d: int
    d_sae: int
    k: int

    @property
    def is_aligned(self) -> bool:
        """Whether many rows are read, each from a multiple of 16 bytes on, as Triton can tell."""
        return self.n > 1 and self.d % 16 == 0 and self.d_sae % 16 == 0


SHAPES = {
    "A": Shape(8192, 768, 24_576, 32),
    "B": Shape(8192, 2048, 65_536, 64),
    "C": Shape(8192, 4096, 131_072, 64),
    "D": Shape(8192, 4096, 1_048_576, 64),
    "odd": Shape(8191, 769, 24_577, 33),  # no size that Triton can tell to be a multiple of 16
    "one": Shape(1, 768, 24_576, 1),  # sizes of 1 become constants of the kernel
}
HALF_SHAPES = ("A",)  # float16 has bfloat16's width and float32's arithmetic: gated here only


def meta(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a tensor without memory. Its address counts as aligned, as an allocator's would."""
    return torch.empty(sizes, dtype=dtype, device="meta")


def codes(shape: Shape, dtype: torch.dtype) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield the values, indices and offsets of a padded and of a ragged code."""
    n, _, _, k = shape
    yield meta(n, k, dtype=dtype), meta(n, k), None
    yield meta(n * k, dtype=dtype), meta(n * k), meta(n + 1)


def run_topk(shape: Shape, dtype: torch.dtype) -> None:
    """A row of pre-activations; k too large for groups; narrow views of wide rows, two k."""
    pre_acts = meta(shape.n, shape.d_sae, dtype=dtype)
    launch_topk(pre_acts, shape.k)
    launch_topk(pre_acts, shape.d_sae // 2)
    launch_topk(pre_acts[:, : shape.d], shape.k)
    launch_topk(pre_acts[:, : shape.d], shape.d // 4)


def run_batch_topk(shape: Shape, dtype: torch.dtype) -> None:
    """A few of a batch's pre-activations, found by groups; half of them, which leave none out."""
    n, _, d_sae, k = shape
    pre_acts = meta(n, d_sae, dtype=dtype)
    for k_total in (n * k, n * d_sae // 2):
        launch_batch_topk(pre_acts, k_total)


def run_threshold_select(shape: Shape, dtype: torch.dtype) -> None:
    """One threshold; one a latent; the same with a window; pairs with and without values."""
    n, _, d_sae, k = shape
    pre_acts, thresholds = meta(n, d_sae, dtype=dtype), meta(d_sae, dtype=torch.float32)
    launch_marks(pre_acts, meta(dtype=dtype), None)
    launch_marks(pre_acts, thresholds, None)
    for marks in launch_marks(pre_acts, thresholds, 0.001):
        ends = marks.counts.view(-1).cumsum(0)
        for source in (pre_acts, None):
            launch_pairs(marks.words, ends, source, n * k, True)


def run_sparse_decode(shape: Shape, dtype: torch.dtype) -> None:
    """Forward with and without a bias, and both gradients."""
    n, d, d_sae, _ = shape
    W_dec, grad = meta(d_sae, d, dtype=dtype), meta(n, d, dtype=dtype)
    for values, indices, offsets in codes(shape, dtype):
        for b_dec in (meta(d, dtype=dtype), None):
            launch_decode(values, indices, offsets, W_dec, b_dec)
        launch_values_grad(grad, indices, offsets, W_dec)
        pairs = by_latent(indices, d_sae, offsets)
        launch_segment_sums(pairs, values, grad, dtype)


def run_sparse_encoder_grad(shape: Shape, dtype: torch.dtype) -> None:
    """The sums over segments, also with float32 gradients of narrower inputs."""
    x = meta(shape.n, shape.d, dtype=dtype)
    for values, indices, offsets in codes(shape, torch.float32):
        pairs = by_latent(indices, shape.d_sae, offsets)
        launch_segment_sums(pairs, values.to(dtype), x, dtype)
        launch_segment_sums(pairs, values, x, torch.float32)


def run_sparse_decode_loss(shape: Shape, dtype: torch.dtype) -> None:
    """The whole dictionary, and four prefixes of it."""
    n, d, d_sae, _ = shape
    W_dec, b_dec, target = (meta(*size, dtype=dtype) for size in ((d_sae, d), (d,), (n, d)))
    nested = [d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
    for code in codes(shape, dtype):
        for ends in ([d_sae], nested):
            weights = [1.0] * len(ends)
            launch_decode_loss(*code, W_dec, b_dec, target, ends, weights)


def run_fused_update(shape: Shape, dtype: torch.dtype) -> None:
    """From a code, with and without single rows' gradients and prefixes, with moments of each
    format, one of them lazily; from gradients that exist."""
    n, d, d_sae, _ = shape
    scalars = AdamScalars(meta(3, dtype=torch.float32), meta())
    weight, bias = meta(d_sae, d, dtype=torch.float32), meta(d_sae, dtype=torch.float32)
    shadow, rows = meta(d_sae, d, dtype=torch.bfloat16), meta(n, d, dtype=dtype)
    values, indices, _ = next(iter(codes(shape, dtype)))
    code = Code(values, indices, values.float())
    pairs = by_latent(indices, d_sae), code, rows, rows
    gradients = Gradients(weight, weight, bias)
    extra, extra_bias = meta(n, d, dtype=torch.float32), meta(n, dtype=torch.float32)
    more = RowGradients(meta(n), extra, extra, extra_bias)
    ends, of_prefixes = (d_sae // 2, d_sae), (*pairs[:2], meta(2 * n, d, dtype=dtype), rows)
    kept_as: dict[MomentFormat, bool] = {"fp32": False, "bf16": True, "8bit": False}
    for moment_format, lazy in kept_as.items():
        kept = new_moments(weight, moment_format)
        dictionary = Dictionary(weight, weight, bias, kept, kept, bias, bias)
        shadowed = dictionary._replace(enc_shadow=shadow, dec_shadow=shadow)
        launch_update(shadowed, scalars, *pairs, None, True, lazy)
        launch_update(shadowed, scalars, *pairs, None, True, lazy, more)
        launch_update(shadowed, scalars, *of_prefixes, None, True, lazy, more, ends)
        if moment_format == "fp32":
            none = None, None, None, None
            launch_update(dictionary, scalars, *none, gradients, False, lazy)


class Case(NamedTuple):
    """What is gated of an op."""

    run: Callable[[Shape, torch.dtype], None]
    streaming: tuple[str, ...]  # its kernels that shall load rows 16 bytes a thread


SUMS = ("_tile_sums_kernel", "_segment_sums_kernel")
CASES = {
    # direct_kernel holds a row in registers, at some widths 4 elements (8 bytes) a thread.
    "topk": Case(run_topk, ("groups_kernel", "streaming_kernel")),
    "batch_topk": Case(run_batch_topk, ("group_maxima_kernel",)),
    "threshold_select": Case(run_threshold_select, ("_mark_kernel",)),
    "sparse_decode": Case(run_sparse_decode, ("_decode_kernel", "_values_grad_kernel", *SUMS)),
    "sparse_encoder_grad": Case(run_sparse_encoder_grad, SUMS),
    "sparse_decode_loss": Case(
        run_sparse_decode_loss, ("_decode_kernel", "_errors_kernel", "_values_grad_kernel")
    ),
    "fused_update": Case(run_fused_update, ("_update_kernel",)),
}


# A reshaped mask of tl.histogram, which need not keep the order that its values are brought into.
LOOSE_MASK = re.compile(r"tt\.reshape \S+ allow_reorder : tensor<[0-9x]+xi1,")


@dataclass
class Task:
    """A specialisation of a kernel to compile, and where it comes from."""

    op: str
    launch: Launch
    dtype: str
    arch: int
    arguments: str  # what it is specialised on, as Triton's binder found it
    shapes: list[str] = field(default_factory=list)  # whose launches need just this one
    needs_wide_loads: bool = False
    grid: tuple[int, ...] = ()  # of those launches, the largest number on each axis


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a task. Sizes are in bytes; loads and stores are instructions."""

    op: str
    kernel: str
    shapes: str
    dtype: str
    arch: int
    arguments: str
    num_warps: int
    registers: int = 0
    stack: int = 0
    local_loads: int = 0
    local_stores: int = 0
    shared: int = 0
    loose_masks: int = 0  # masks that the compiler may reorder apart from what they mask
    wide_loads: int = 0
    global_loads: int = 0
    atomics: int = 0
    seconds: float = 0.0
    broken: tuple[str, ...] = ()  # the rules that it breaks, each with what was found


class AbsentGpu:
    """Stands in for Triton's driver, so that its binder and compiler take a GPU that is not here.

    The device's number is the architecture's: Triton keeps compiled kernels by that number.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _device: int) -> int:
        return 0


def pretend(arch: int) -> None:
    """Make Triton believe that its current GPU is an sm_`arch`."""
    from triton.runtime import driver

    driver.set_active(AbsentGpu(arch))  # pyright: ignore[reportArgumentType]


def kernel_name(launch: Launch) -> str:
    """Return the name of the launched kernel's function."""
    return launch.kernel.fn.__name__


def record(op: str, shape: Shape, dtype: torch.dtype) -> list[Launch]:
    """Return the launches of an op at a shape. An empty grid launches nothing."""
    with record_launches() as launches:
        CASES[op].run(shape, dtype)
    return [launch for launch in launches if 0 not in launch.grid]


def find_tasks(
    ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], archs: Sequence[int]
) -> list[Task]:
    """Return what to compile, each specialisation once."""
    tasks: dict[Any, Task] = {}
    wanted = [
        (op, dtype, name)
        for op in ops
        for dtype in dtypes
        for name in shapes
        if dtype != "fp16" or name in HALF_SHAPES
    ]
    for op, dtype, name in wanted:
        shape = SHAPES[name]
        for launch in record(op, shape, DTYPES[dtype]):
            streams = kernel_name(launch) in CASES[op].streaming
            for arch in archs:
                arguments = specialise(launch, arch)
                key = launch.kernel, arch, arguments, launch.num_warps, launch.num_stages
                task = tasks.setdefault(key, Task(op, launch, dtype, arch, arguments))
                task.needs_wide_loads |= streams and shape.is_aligned
                task.grid = tuple(map(max, launch.grid, task.grid or launch.grid))
                if name not in task.shapes:
                    task.shapes.append(name)
    return list(tasks.values())


def specialise(launch: Launch, arch: int) -> str:
    """Return what a kernel is compiled for: types, constants, alignments, options of a launch."""
    pretend(arch)
    binder = launch.kernel.device_caches[arch][4]
    _, arguments, options = binder(*launch.args, **launch.constants)
    names = [parameter.name for parameter in launch.kernel.params]
    kinds = (" ".join(str(part) for part in kind if part not in ("", None)) for kind in arguments)
    named = [*zip(names, kinds, strict=True), *options.items()]
    return ", ".join(f"{name}: {kind}" for name, kind in named)


def compile_task(task: Task) -> Row:
    """Compile a task and read its machine code."""
    launch, started = task.launch, time.perf_counter()
    named = {
        "op": task.op,
        "kernel": kernel_name(launch),
        "shapes": " ".join(task.shapes),
        "dtype": task.dtype,
        "arch": task.arch,
        "arguments": task.arguments,
        "num_warps": launch.num_warps,
    }
    try:
        compiled = compile_launch(launch, task.arch)
    except Exception as error:  # whatever Triton or ptxas found: it is the row's verdict
        return Row(**named, broken=(f"compiles: {type(error).__name__}: {error}",))
    figures = measure(compiled)
    figures["seconds"] = round(time.perf_counter() - started, 2)
    broken = broken_rules(figures, task)
    return Row(**named, **figures, broken=tuple(broken))


def compile_launch(launch: Launch, arch: int) -> Any:
    """Return Triton's compiled kernel of a recorded launch."""
    pretend(arch)
    return launch.kernel.warmup(
        *launch.args,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch.constants,
    )


def measure(compiled: Any) -> dict[str, Any]:
    """Return the figures of a Row that the compiled kernel's machine code shows."""
    text = disassemble(compiled.asm["cubin"])
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "loose_masks": len(LOOSE_MASK.findall(compiled.asm["ttgir"])),
        **count_memory_accesses(text),
    }


def count_memory_accesses(text: str) -> dict[str, int]:
    """Return the figures of a Row that a disassembly's instructions make up."""
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@\S+ +)?([A-Z][A-Z0-9_.]*)", text))
    return {
        "local_loads": count(opcodes, "LDL"),
        "local_stores": count(opcodes, "STL"),
        "global_loads": count(opcodes, "LDG", "LDGSTS"),
        "wide_loads": count(opcodes, "LDG", "LDGSTS", width=("128", "256")),
        "atomics": count(opcodes, "RED", "REDG", "ATOM", "ATOMG"),
    }


def disassemble(cubin: bytes) -> str:
    """Return cuobjdump's account of a kernel: resources and instructions."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count(opcodes: Counter[str], *names: str, width: tuple[str, ...] = ()) -> int:
    """Return how many instructions have one of the names and, if given, one of the widths.

    `opcodes` counts them by name with modifiers: LDG.E.128.
    """
    total = 0
    for opcode, times in opcodes.items():
        name, *modifiers = opcode.split(".")
        if name in names and (not width or set(width) & set(modifiers)):
            total += times
    return total


def broken_rules(figures: dict[str, Any], task: Task) -> list[str]:
    """Return the rules that the figures of a compiled task break, each with what was found."""
    loads, stores, shared, atomics = (
        figures[name] for name in ("local_loads", "local_stores", "shared", "atomics")
    )
    fits_grid = all(n <= most for n, most in zip(task.grid, GRID, strict=False))
    found = {
        f"spills: {loads} local loads and {stores} local stores": loads or stores,
        f"shared memory: {shared} bytes of {SHARED_BYTES[task.arch]}": (
            shared > SHARED_BYTES[task.arch]
        ),
        f"wide loads: none of {figures['global_loads']} global loads is 16 bytes": (
            task.needs_wide_loads and not figures["wide_loads"]
        ),
        f"grid: {task.grid} exceeds {GRID}": not fits_grid,
        f"atomics: {atomics} on global memory": atomics,
        f"masks: {figures['loose_masks']} may be reordered apart from what they mask": (
            figures["loose_masks"]
        ),
    }
    return [rule for rule, is_broken in found.items() if is_broken]


def compile_all(tasks: list[Task], jobs: int) -> Iterable[Row]:
    """Yield the tasks' rows, in order, compiled by that many processes."""
    # Launches hold functions and tensors that a fork inherits and a pickle would not carry.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, fork, _inherit, (tasks,)) as pool:
        yield from pool.map(_compile_inherited, range(len(tasks)))


_inherited: list[Task] = []


def _inherit(tasks: list[Task]) -> None:
    _inherited[:] = tasks


def _compile_inherited(position: int) -> Row:
    return compile_task(_inherited[position])


COLUMNS: dict[str, Callable[[Row], Any]] = {
    "op": lambda row: row.op,
    "kernel": lambda row: row.kernel,
    "shapes": lambda row: row.shapes,
    "dtype": lambda row: row.dtype,
    "sm": lambda row: row.arch,
    "warps": lambda row: row.num_warps,
    "regs": lambda row: row.registers,
    "stack": lambda row: row.stack,
    "ldl/stl": lambda row: f"{row.local_loads}/{row.local_stores}",
    "shared": lambda row: row.shared,
    "wide/ldg": lambda row: f"{row.wide_loads}/{row.global_loads}",
    "atom": lambda row: row.atomics,
    "s": lambda row: f"{row.seconds:.1f}",
}


def print_rows(rows: Iterable[Row], tasks: list[Task]) -> list[Row]:
    """Print each row as it comes; return them all."""
    longest = {
        "op": max(len(task.op) for task in tasks),
        "kernel": max(len(kernel_name(task.launch)) for task in tasks),
        "shapes": max(len(" ".join(task.shapes)) for task in tasks),
    }
    widths = {name: max(longest.get(name, 6), len(name)) for name in COLUMNS}
    print("  ".join(name.ljust(width) for name, width in widths.items()))
    shown = []
    for row in rows:
        cells = (str(read(row)).ljust(widths[name]) for name, read in COLUMNS.items())
        print("  ".join(cells).rstrip(), flush=True)
        for rule in row.broken:
            print(f"    REFUSED, {rule}\n    compiled for {row.arguments}", flush=True)
        shown.append(row)
    return shown


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's choices; stop with a message where they cannot be served."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    archs = [80, 90, 100]
    parser.add_argument("--arch", nargs="+", type=int, default=archs, choices=archs)
    parser.add_argument("--ops", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    flags = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"):
        parser.error("kernels are compiled, not interpreted: unset TRITON_INTERPRET")
    if not HAS_TRITON:
        parser.error("the package `triton` must be installed; python3 scripts/install.py dev")
    return flags


def main(arguments: Sequence[str]) -> int:
    """Compile, print, gate; return the exit code."""
    flags = read_flags(arguments)
    # Triton 3.9 warns where this is unset, and takes what it says.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    started = time.perf_counter()
    tasks = find_tasks(flags.ops, flags.shapes, flags.dtypes, flags.arch)
    try:
        rows = print_rows(compile_all(tasks, flags.jobs), tasks)
    except BrokenProcessPool:
        sys.exit("A compiler process died at the row after the last; --jobs 1 shows which.")
    if flags.json:
        flags.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    refused = [row for row in rows if row.broken]
    seconds = time.perf_counter() - started
    print(f"{len(rows)} kernels compiled in {seconds:.0f} s, {len(refused)} refused")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
