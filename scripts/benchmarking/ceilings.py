"""Measures what the device can do, before anything is compared with it."""

import torch

from .clocks import Clock, CpuClock, CudaClock
from .floors import Ceilings

GPU_COPY_BYTES = 2**31
CPU_COPY_BYTES = 2**26
GPU_MATMUL_SIZE = 8192
CPU_MATMUL_SIZE = 1024


def measure_ceilings(clock: Clock, device: torch.device) -> Ceilings:
    """Return the bandwidth of a large copy and of one inside L2, and the rate of a matmul."""
    on_gpu = clock.device_type == "cuda"
    if not on_gpu:  # what a shared processor can do at its best
        clock = CpuClock(seconds=1.0, statistic=min)
    copy = copy_rate(clock, device, GPU_COPY_BYTES if on_gpu else CPU_COPY_BYTES)
    matmul = matmul_rate(clock, device)
    l2 = l2_rate(clock, device, copy) if isinstance(clock, CudaClock) else copy
    return Ceilings(copy, l2, matmul, clock.l2_bytes)


def copy_rate(clock: Clock, device: torch.device, n_bytes: int, *, in_l2: bool = False) -> float:
    """Return bytes read and written a second by a copy of `n_bytes`."""
    return 2 * n_bytes / _copy_seconds(clock, device, n_bytes, in_l2)


def _copy_seconds(clock: Clock, device: torch.device, n_bytes: int, in_l2: bool) -> float:
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    # A replayed graph leaves L2 as it is; do_bench clears it before each call.
    (timing,) = clock.time([[lambda: target.copy_(source)]], graph=in_l2)
    return timing.ms / 1e3


def l2_rate(clock: CudaClock, device: torch.device, copy: float) -> float:
    """Return the bandwidth of copies inside L2, from the difference between two sizes.

    The difference leaves out what starting a kernel costs. Held between the large copy's bandwidth
    and four times it; where graphs do not work it cannot be measured, and is the large copy's.
    """
    small, large = (clock.l2_bytes // part // 4096 * 4096 for part in (16, 5))
    seconds = [_copy_seconds(clock, device, size, True) for size in (small, large)]
    if not clock.use_graphs or seconds[1] <= seconds[0]:
        clock.notes.append("The L2's bandwidth could not be measured; the large copy's stands in.")
        return copy
    return min(max(2 * (large - small) / (seconds[1] - seconds[0]), copy), 4 * copy)


def matmul_rate(clock: Clock, device: torch.device) -> float:
    """Return FLOPs a second of a square matmul of normal numbers, bf16 on a GPU."""
    on_gpu = clock.device_type == "cuda"
    size = GPU_MATMUL_SIZE if on_gpu else CPU_MATMUL_SIZE
    dtype = torch.bfloat16 if on_gpu else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in "ab")
    out = torch.empty_like(a)
    (timing,) = clock.time([[lambda: torch.mm(a, b, out=out)]], graph=False)
    return 2 * size**3 / (timing.ms / 1e3)
