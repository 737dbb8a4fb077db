"""Adam's two moments of a weight matrix, in 32, 16 or 8 bits an element.

A moment changes by 0.1% a step, less than half a unit in the last place of a 16- or 8-bit number,
so rounding to nearest would freeze it. All narrow formats therefore round stochastically, in a way
that is a pure function of (step, row, column): the expectation is exact, and a run repeats bitwise.

fp32: as they are. bf16: the float32 bits cut after 16, plus one with the probability of what was
cut. 8 bits, with one float32 scale a row, the row's largest magnitude: m is sign · (q/127)² ·
scale, q of 7 bits, and v is (q/255)⁴ · scale. The powers keep small elements: the least m is 6e-5
and the least v 2e-10 of the row's largest. A v above zero never rounds to zero, which would let its
update explode; the excess is below 2e-10 of the scale.
Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (the aim, and one scale
a block; ours is a power law and stochastic).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .launching import tl, triton

MomentFormat = Literal["fp32", "bf16", "8bit"]
FORMATS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "8bit": (torch.int8, torch.uint8),
}


class Moments(NamedTuple):
    """The moments of a weight matrix (F, d); scales (F,) are all ones but in 8 bits."""

    m: Tensor  # (F, d) float32, bfloat16 or int8
    v: Tensor  # (F, d) float32, bfloat16 or uint8
    m_scale: Tensor  # (F,) float32
    v_scale: Tensor  # (F,) float32


def new_moments(weight: Tensor, moment_format: MomentFormat = "fp32") -> Moments:
    """Return zero moments for `weight` (F, d), on its device.

    Raises ValueError for an unknown format.
    """
    if moment_format not in FORMATS:
        raise ValueError(
            f"`moment_format` must be one of {tuple(FORMATS)}; got {moment_format!r}. "
            "Pass 'fp32' where memory allows."
        )
    m_dtype, v_dtype = FORMATS[moment_format]
    scale = weight.new_ones(weight.shape[0], dtype=torch.float32)
    m, v = (torch.zeros_like(weight, dtype=dtype) for dtype in (m_dtype, v_dtype))
    return Moments(m, v, scale, scale.clone())


# ---- the torch form: whole matrices


def read_moments(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return m and v (F, d) in float32."""
    m, v = moments.m.float(), moments.v.float()
    if moments.m.dtype == torch.int8:
        m = m * m.abs() / 127**2 * moments.m_scale[:, None]
        v = (v / 255).pow(4) * moments.v_scale[:, None]
    return m, v


def write_moments_(
    moments: Moments, m: Tensor, v: Tensor, step: int | Tensor, row: int = 0
) -> None:
    """Round m and v (F, d) float32 into `moments`, in place.

    `row` is the first row's place in its matrix.
    """
    if moments.m.dtype == torch.float32:
        moments.m.copy_(m)
        moments.v.copy_(v)
        return
    noise = noise_of(m.shape[0], m.shape[1], step, m.device, row)
    for_m, for_v = noise & 0xFFFF, noise >> 16
    if moments.m.dtype == torch.bfloat16:
        moments.m.copy_(_round_bf16(m, for_m))
        moments.v.copy_(_round_bf16(v, for_v))
        return
    m_scale, v_scale = (_row_scale(moment) for moment in (m, v))
    moments.m_scale.copy_(m_scale)
    moments.v_scale.copy_(v_scale)
    q = _round_power(m.abs() / m_scale[:, None], for_m, 127, 2)
    moments.m.copy_(q * m.sign())
    q = _round_power(v / v_scale[:, None], for_v, 255, 4)
    moments.v.copy_(torch.maximum(q, (v > 0).float()))


def noise_of(
    n_rows: int, n_cols: int, step: int | Tensor, device: torch.device, row: int = 0
) -> Tensor:
    """Return 32 pseudo-random bits (n_rows, n_cols) int64 for each element at this step.

    `row` is the first row's place in its matrix.
    """
    rows = torch.arange(row, row + n_rows, device=device)[:, None]
    cols = torch.arange(n_cols, device=device)[None, :]
    h = rows * 0x85EBCA6B + cols * 0xC2B2AE35 + step * 0x27D4EB2F
    h = (h ^ (h >> 32)) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def _round_bf16(x: Tensor, noise: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32).long() + noise
    return ((bits >> 16) << 16).to(torch.int32).view(torch.float32)


def _row_scale(moment: Tensor) -> Tensor:
    """Return each row's largest magnitude, or 1 for a row of zeros."""
    largest = moment.abs().amax(1)
    return largest.where(largest > 0, 1.0)


def _round_power(share: Tensor, noise: Tensor, most: int, power: int) -> Tensor:
    """Return q in [0, most] with E[(q / most)^power] = share, share in [0, 1]."""
    root = share.sqrt() if power == 2 else share.sqrt().sqrt()
    low = (root * most).floor().clamp(max=most - 1)
    below, above = (low / most).pow(power), ((low + 1) / most).pow(power)
    return low + ((noise.float() + 0.5) / 65536 < (share - below) / (above - below)).float()


# ---- the kernels' form: one row


@triton.jit
def row_noise(row, cols, step):
    """Return 32 pseudo-random bits, uint32, for the elements `cols` of a row at a step (int64)."""
    h = row * 0x85EBCA6B + cols.to(tl.int64) * 0xC2B2AE35 + step * 0x27D4EB2F
    h = (h ^ (h >> 32)).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def round_bf16(x, noise):
    """Return float32 `x` rounded stochastically to a value of bfloat16, by 16 bits of noise."""
    bits = x.to(tl.uint32, bitcast=True) + noise
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def power_of(x, POWER: tl.constexpr):
    """Return x² or x⁴."""
    square = x * x
    return square if POWER == 2 else square * square


@triton.jit
def round_power(share, noise, MOST: tl.constexpr, POWER: tl.constexpr):
    """Return q in [0, MOST] with E[(q / MOST)^POWER] = share, share in [0, 1]."""
    root = tl.sqrt(share)
    if POWER == 4:
        root = tl.sqrt(root)
    low = tl.minimum(tl.floor(root * MOST), MOST - 1.0)
    below = power_of(low / MOST, POWER)
    above = power_of((low + 1.0) / MOST, POWER)
    chance = (noise.to(tl.float32) + 0.5) / 65536
    return low + tl.where(chance < (share - below) / (above - below), 1.0, 0.0)


@triton.jit
def row_scale(moment):
    """Return a row's largest magnitude, or 1 for a row of zeros."""
    largest = tl.max(tl.abs(moment), axis=0)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit
def load_moments(row, at, inside, m, v, m_scale, v_scale):
    """Return a row's moments at the elements `at`, in float32."""
    first = tl.load(m + at, mask=inside, other=0).to(tl.float32)
    second = tl.load(v + at, mask=inside, other=0).to(tl.float32)
    if m.dtype.element_ty == tl.int8:
        first = first * tl.abs(first) * (tl.load(m_scale + row) / (127.0 * 127.0))
        second = power_of(second / 255.0, 4) * tl.load(v_scale + row)
    return first, second


@triton.jit
def store_moments(row, cols, at, inside, step, first, second, m, v, m_scale, v_scale):
    """Round a row's moments into their format and store them."""
    if m.dtype.element_ty == tl.float32:
        tl.store(m + at, first, mask=inside)
        tl.store(v + at, second, mask=inside)
    else:
        noise = row_noise(row, cols, step)
        for_first, for_second = noise & 0xFFFF, noise >> 16
        if m.dtype.element_ty == tl.bfloat16:
            tl.store(m + at, round_bf16(first, for_first).to(tl.bfloat16), mask=inside)
            tl.store(v + at, round_bf16(second, for_second).to(tl.bfloat16), mask=inside)
        else:
            scale = row_scale(first)
            tl.store(m_scale + row, scale)
            q = round_power(tl.abs(first) / scale, for_first, 127, 2)
            tl.store(m + at, tl.where(first < 0, -q, q).to(tl.int8), mask=inside)
            scale = row_scale(second)
            tl.store(v_scale + row, scale)
            q = round_power(second / scale, for_second, 255, 4)
            q = tl.maximum(q, tl.where(second > 0, 1.0, 0.0))
            tl.store(v + at, q.to(tl.uint8), mask=inside)
