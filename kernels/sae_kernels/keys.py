"""Floats as integers of the same order: selection by counting, exact for ties, NaN and infinities.

A float's bits, read as a signed integer, already ascend for positive floats; for negative ones the
lower bits are flipped. NaN of either sign becomes the largest key, as `torch.topk` has it. −0 comes
just below +0; they are equal as floats, so either may be taken. float16 and bfloat16 are exact in
float32 and leave its low bits alone, so their keys are shifted down to 19 and 16 bits, and a search
over the bits of the key is that much shorter.

LOWEST of a key width is below the key of every float, −inf included: it pads masked lanes.
"""

import torch

from .launching import tl, triton

KEY_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}


@triton.jit
def order_key(x, BITS: tl.constexpr):
    """Return int32 keys of the float32 values `x` (of a dtype with BITS key bits) in x's order."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFF, key) >> (32 - BITS)


@triton.jit
def lowest_key(BITS: tl.constexpr):
    """Return the int32 scalar below every key of BITS bits."""
    return tl.full((), -(2 ** (BITS - 1)), tl.int32)


@triton.jit
def count_at_least(keys, bound):
    """Return how many of the int32 `keys` (one axis) are ≥ `bound`."""
    return tl.sum((keys >= bound).to(tl.int32), axis=0)


@triton.jit
def kth_largest(keys, k, BITS: tl.constexpr):
    """Return the k-th largest of the int32 `keys` (one axis), 1 ≤ k ≤ their number.

    It is the largest t with count(keys >= t) >= k, found bit by bit from the sign down.
    """
    t = tl.where(count_at_least(keys, 0) >= k, 0, lowest_key(BITS))
    for step in range(BITS - 1):
        candidate = t + (1 << (BITS - 2 - step))
        t = tl.where(count_at_least(keys, candidate) >= k, candidate, t)
    return t


@triton.jit
def exactly_k(keys, k, BITS: tl.constexpr):
    """Return the mask of exactly k largest int32 `keys` (one axis); among equals, the first."""
    t = kth_largest(keys, k, BITS)
    above = keys > t
    equal = (keys == t).to(tl.int32)
    wanted = k - tl.sum(above.to(tl.int32), axis=0)
    return above | ((equal > 0) & (tl.cumsum(equal, 0) <= wanted))


@triton.jit
def load_keys(ptr, offsets, mask, BITS: tl.constexpr):
    """Return the keys of the floats at `ptr + offsets`, and the lowest key where not `mask`."""
    x = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, order_key(x, BITS), lowest_key(BITS))
