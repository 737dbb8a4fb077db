"""The rows of a step's table: who trains, from which source, how exactly, towards which goal."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch

from .floors import Term, encoder_matmul, n_weights
from .rows import OURS
from .shapes import Shape
from .step_floors import Moments, Precision, step_work
from .step_ours import ours
from .step_peers import (
    DENSE,
    DICTIONARY_LEARNING,
    SAE_LENS,
    SKETCH,
    SPARSIFY_STEP,
    bare_matmul,
    dense_autograd,
    dictionary_learning,
    sae_lens,
    sparsify,
    torch_sketch,
)
from .step_shapes import n_dead_of
from .step_task import Task, Trainee

UNIT = "bare encoder matmul"
FRESH = "the same, fresh memory"
UNTRAINED = (UNIT, FRESH)
FUSED = "ours, fused"
# How far the loss of a step may be from the exact one, relatively.
EXACT, ROUNDED, ALIKE = 1e-4, 1e-2, 0.1
TORCH_ADAM = 16  # bytes a weight: parameter, gradient and two moments in float32


class StepContender(NamedTuple):
    """One way to train.

    work: the floor's terms at a shape, given the number of dead latents; None where the measured
    ceilings are not of its precision. weight_bytes: what it surely holds of each weight.
    dense_bytes: and of each of n · d_sae activations.
    """

    name: str
    source: str
    make: Callable[[Task], Trainee]
    tolerance: float
    work: Callable[[Shape, int], tuple[Term, ...]] | None
    weight_bytes: int
    dense_bytes: int = 0
    devices: tuple[str, ...] = ("cuda", "cpu")
    with_auxk: bool = False
    n_checked: int = 6  # losses that are compared; those after them are no peer's to match


class Goal(NamedTuple):
    """A bound: on milliseconds, on the multiple of the unit, or on how much slower than ours."""

    of: Literal["ms", "over_unit", "over_fused"]
    bound: float

    def is_met(self, value: float) -> bool:
        """Say whether the row's number is on the right side; a peer should be the slower one."""
        return value >= self.bound if self.of == "over_fused" else value <= self.bound

    def __str__(self) -> str:
        return {
            "ms": f"≤ {self.bound:g} ms",
            "over_unit": f"≤ {self.bound:g}× the matmul",
            "over_fused": f"≥ {self.bound:g}× ours",
        }[self.of]


CPU_GOALS = {
    (FUSED, "small"): Goal("over_unit", 1.3),
    (FUSED, "wide"): Goal("over_unit", 1.35),
    (f"{FUSED}, bf16", "small"): Goal("over_unit", 0.8),
    (f"{FUSED}, bf16", "wide"): Goal("over_unit", 0.8),
}
H200_GOALS = {
    (FUSED, "A"): Goal("ms", 1.3),
    (FUSED, "B"): Goal("ms", 7.0),
    (FUSED, "C"): Goal("ms", 24),
    (f"{FUSED}, AuxK", "A"): Goal("ms", 2.0),
    (f"{FUSED}, AuxK", "B"): Goal("ms", 9.0),
    (f"{FUSED}, AuxK", "C"): Goal("ms", 28),
    ("eai-sparsify", "C"): Goal("over_fused", 2),
    ("dense autograd, bf16", "C"): Goal("over_fused", 5),
}


def contenders(kind: str) -> list[StepContender]:
    """Return the rows of a device, in the table's order, the unit first."""
    normal: Precision = "bf16" if kind == "cuda" else "fp32"
    rows = [*_matmuls(normal), *_ours(normal), *_peers(normal)]
    return [row for row in rows if kind in row.devices]


def _matmuls(normal: Precision) -> list[StepContender]:
    """Return the unit, and the same with what a CPU pays for a new output each time."""
    dtype = torch.bfloat16 if normal == "bf16" else torch.float32
    sources = {
        UNIT: (f"torch.mm with out=, {normal}: the unit", False, ("cuda", "cpu")),
        FRESH: (f"torch.mm without out=, {normal}", True, ("cpu",)),
    }
    return [
        StepContender(
            name,
            source,
            partial(bare_matmul, dtype=dtype, is_fresh=is_fresh),
            ALIKE,
            lambda shape, _: (encoder_matmul(shape),),
            weight_bytes=1,
            dense_bytes=2,
            devices=devices,
        )
        for name, (source, is_fresh, devices) in sources.items()
    ]


def _ours(normal: Precision) -> list[StepContender]:
    tolerance = EXACT if normal == "fp32" else ROUNDED
    held = 12 if normal == "fp32" else 14  # with 16-bit copies of both weights
    exact = partial(step_work, precision=normal)
    return [
        StepContender(FUSED, OURS, _fused(normal), tolerance, _floor(normal), held),
        StepContender(
            f"{FUSED}, AuxK",
            OURS,
            lambda task: ours(task, "fused", normal, with_auxk=True),
            tolerance,
            lambda shape, n_dead: exact(shape, n_dead=n_dead),
            held,
            with_auxk=True,
        ),
        StepContender(f"{FUSED}, bf16", OURS, _fused("bf16"), ROUNDED, None, 12, devices=("cpu",)),
        StepContender(
            f"{FUSED}, 8-bit moments",
            OURS,
            _fused(normal, "8bit"),
            ROUNDED,
            _floor(normal, "8bit"),
            held - 6,
        ),
        StepContender(
            "ours, autograd",
            OURS,
            lambda task: ours(task, "autograd", normal),
            tolerance,
            _floor(normal),
            TORCH_ADAM,
        ),
    ]


def _peers(normal: Precision) -> list[StepContender]:
    on_cpu, floor = ("cpu",), _floor(normal)
    row = partial(
        StepContender, tolerance=ALIKE, weight_bytes=TORCH_ADAM, dense_bytes=2, n_checked=3
    )
    dense, dense_bf16 = (partial(dense_autograd, is_bf16=is_bf16) for is_bf16 in (False, True))
    bf16_floor = floor if normal == "bf16" else None
    return [
        row("dense autograd, fp32", f"{DENSE}, fp32", dense, work=floor, devices=on_cpu),
        row("dense autograd, bf16", f"{DENSE}, autocast bf16", dense_bf16, work=bf16_floor),
        row("torch-ops sketch", SKETCH, torch_sketch, work=floor, devices=on_cpu),
        row("eai-sparsify", SPARSIFY_STEP, sparsify, work=floor),
        row("sae-lens", SAE_LENS, sae_lens, work=floor, devices=on_cpu),
        row(
            "dictionary_learning",
            DICTIONARY_LEARNING,
            dictionary_learning,
            work=floor,
            devices=on_cpu,
        ),
    ]


def _fused(precision: Precision, moments: Moments = "fp32") -> Callable[[Task], Trainee]:
    return lambda task: ours(task, "fused", precision, moments)


def _floor(
    precision: Precision, moments: Moments = "fp32"
) -> Callable[[Shape, int], tuple[Term, ...]]:
    return lambda shape, _: step_work(shape, precision, moments)


def least_bytes(contender: StepContender, shape: Shape) -> int:
    """Return the memory that this way of training cannot do without."""
    dense = contender.dense_bytes * shape.n * shape.d_sae
    return contender.weight_bytes * n_weights(shape) + dense


def n_dead_in(contender: StepContender, shape: Shape, kind: str) -> int:
    """Return how many dead latents a contender's step trains."""
    return n_dead_of(shape, kind) if contender.with_auxk else 0
