"""The one door to Triton: whether its kernels can run here, how they are launched, or recorded.

Triton is optional: without it this module's `triton` and `tl` are stand-ins, the kernels stay plain
functions that nobody calls, and every op takes its torch form. With `TRITON_INTERPRET=1` in the
environment before this package is imported, kernels run on CPU tensors, one program at a time:
that proves their arithmetic, not their speed or their races.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:  # the language inside a kernel is not Python's; no checker follows it
    HAS_TRITON = True
    triton: Any

    class _Anything(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_Anything):
        constexpr = Any
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # macOS, Windows: no kernels, and nothing else changes

        class _NoTriton:
            """Lets the kernels' definitions be read: decorators and annotations do nothing."""

            constexpr = None

            def jit(self, function):
                return function

        triton = tl = _NoTriton()
        HAS_TRITON = False
    else:
        HAS_TRITON = True

INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Launch(NamedTuple):
    """A launch that was recorded in place of being made."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect launches in place of making them: launchers then run on meta tensors, without a GPU.

    So a kernel can be compiled for a GPU that is not here with just the types, constants and
    alignments that its launcher would have passed.
    """
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Run `kernel` on `grid` with positional `args` (tensors, numbers or None) and constexprs.

    An empty grid launches nothing. Rows belong on the grid's first axis: the others hold 65535.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, num_warps, num_stages))
        return
    if 0 in grid:
        return
    with _on_the_device_of(*args):
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)


def _on_the_device_of(*args: Any) -> AbstractContextManager[Any]:
    """Return the context that makes the tensors' GPU the current one, as Triton's launch needs."""
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_cuda:
            return torch.cuda.device(arg.device)
    return nullcontext()


def why_not_triton(*tensors: Tensor | None) -> str | None:
    """Return why Triton's kernels cannot take these tensors, in a few words, or None."""
    if not HAS_TRITON:
        return "the package `triton` is not installed"
    for tensor in tensors:
        if tensor is None:
            continue
        if not (tensor.is_cuda or INTERPRETING):
            return f"the tensors are on {tensor.device}, not on a CUDA device"
        if tensor.is_floating_point() and tensor.dtype not in TRITON_DTYPES:
            return f"{tensor.dtype} is not one of float16, bfloat16, float32"
    return None


def next_power_of_2(n: int) -> int:
    """Return the least power of two at or above n ≥ 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)
