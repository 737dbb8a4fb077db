"""Kernels that break one rule of the compile gate each, and one that keeps them all.

As a script: `compile_kernels.py` with these in place of the package's kernels.
"""

import sys

import compile_kernels as gate
import torch

from sae_kernels.launching import launch, tl, triton

WIDTH = 1024


@triton.jit
def _copy(x, out, stride, n, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = row * stride + tl.arange(0, WIDTH)
    tl.store(out + at, tl.load(x + at), mask=row < n)


@triton.jit
def _hold_too_much(x, out, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    row = tl.load(x + at)
    tl.store(out + at, row - tl.max(row, axis=0))


@triton.jit
def _add_atomically(x, out, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    tl.atomic_add(out + at, tl.load(x + at))


@triton.jit
def _share_too_much(x, y, out, SIDE: tl.constexpr, WIDTH: tl.constexpr):
    side, wide = tl.arange(0, SIDE), tl.arange(0, WIDTH)
    left = tl.load(x + side[:, None] * WIDTH + wide[None, :])
    right = tl.load(y + wide[:, None] * SIDE + side[None, :])
    tl.store(out + side[:, None] * SIDE + side[None, :], tl.dot(left, right))


@triton.jit
def _count_by_mask(x, out, n, SIDE: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, SIDE)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    row = tl.load(x + at, mask=at < n, other=0.0)
    digits = tl.reshape(row.to(tl.int32) & 255, (SIDE * WIDTH,))
    counts = tl.histogram(digits, 256, mask=tl.reshape(at < n, (SIDE * WIDTH,)))
    tl.store(out + tl.arange(0, 256), counts)


@triton.jit
def _misuse_arange(out, WIDTH: tl.constexpr):
    tl.store(out + tl.arange(0, WIDTH), 0.0)


X = gate.meta(8, WIDTH, dtype=torch.float32)
HALF = gate.meta(64, WIDTH, dtype=torch.float16)
GRID, CROWD = (8,), (1, 65_536)
TOYS = {  # kernel, grid, arguments, constants
    "good": (_copy, GRID, (X, X, WIDTH, 2**31), {"WIDTH": WIDTH}),
    "empty": (_copy, (0,), (X, X, WIDTH, 9), {"WIDTH": WIDTH}),
    "unaligned": (_copy, GRID, (X, X, WIDTH + 1, 1), {"WIDTH": WIDTH}),
    "crowding": (_copy, CROWD, (X, X, WIDTH, 7), {"WIDTH": WIDTH}),
    "spilling": (_hold_too_much, GRID, (X, X), {"WIDTH": 8 * WIDTH, "num_warps": 1}),
    "capped": (_hold_too_much, GRID, (X, X), {"WIDTH": 2 * WIDTH, "num_warps": 1, "maxnreg": 32}),
    "atomic": (_add_atomically, GRID, (X, X), {"WIDTH": WIDTH}),
    "sharing": (
        _share_too_much,
        GRID,
        (HALF, HALF, X),
        {"SIDE": 64, "WIDTH": WIDTH, "num_warps": 8},
    ),
    "masked": (
        _count_by_mask,
        GRID,
        (X, gate.meta(256, dtype=torch.int32), 64),
        {"SIDE": 128, "WIDTH": 8},
    ),
    "wrong": (_misuse_arange, GRID, (X,), {"WIDTH": WIDTH - 1}),
}


def case(name: str) -> gate.Case:
    """Return a toy as an op that the gate knows."""
    kernel, grid, args, constants = TOYS[name]

    def run(_shape: gate.Shape, _dtype: torch.dtype) -> None:
        launch(kernel, grid, *args, **constants)

    return gate.Case(run, (kernel.fn.__name__,))


if __name__ == "__main__":
    gate.CASES.clear()
    gate.CASES.update((name, case(name)) for name in TOYS)
    sys.exit(gate.main(sys.argv[1:]))
