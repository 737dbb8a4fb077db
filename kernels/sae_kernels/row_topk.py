"""Exact top-k of each row.

Maths: the k largest elements of a row of F, NaN counting as largest, as `torch.topk` has it.
Shapes: x (..., F) floating → values (..., k) of x's dtype, indices (..., k) int64.
Bytes: one read of x, F·itemsize a row. Deterministic: yes; among equal elements which one is taken
is unspecified. Gradient: grad_values scattered into zeros of x's shape.

Group maxima: cut a row into groups; the k groups with the largest maxima hold at least k elements
≥ the smallest of those maxima, and everything outside them is ≤ it. So their members always
contain a valid top-k set: exact, with no threshold to guess and no buffer to overflow.
"""

import torch
from torch import Tensor

from .checks import Impl, check_at_least_1d, check_floating, check_k, use_reference

# Below 64 elements for each one kept, the candidates (k · group size) cost what the groups save.
MIN_ROW_PER_K = 64
# Of 2..32, groups of 8 were among the fastest on CPU for F 4608..24576 and k 32..128: 1.1 to 3
# times faster than torch.topk, most on the longest rows.
CPU_GROUP_SIZE = 8


def topk_reference(x: Tensor, k: int, *, sorted: bool = False) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row (..., F) as values and indices, by `torch.topk`."""
    values, indices = torch.topk(x, k, dim=-1, sorted=sorted)
    return values, indices


def topk_by_groups(
    x: Tensor, k: int, *, group_size: int, interleaved: bool, sorted: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row by group maxima; needs `F // group_size >= k`.

    `interleaved` chooses the groups: member m of group g is element m·G + g of a row in place of
    g·group_size + m. A CPU takes the maxima of interleaved groups with vector instructions across
    groups; a GPU reads the members of contiguous groups in whole sectors. A tail that fills no
    group is always a candidate. Differentiable in x.
    """
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    with torch.no_grad():
        indices = _group_candidates(rows, k, group_size, interleaved)
        chosen = rows.gather(1, indices).topk(k, dim=-1, sorted=sorted)[1]
        indices = indices.gather(1, chosen)
    values = rows.gather(1, indices)
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)


def _group_candidates(rows: Tensor, k: int, group_size: int, interleaved: bool) -> Tensor:
    """Return the positions (n, k · group_size + tail) in which each row's top-k surely lies."""
    n, width = rows.shape
    n_groups = width // group_size
    grouped = rows[:, : n_groups * group_size]
    if interleaved:
        maxima = grouped.unflatten(1, (group_size, n_groups)).amax(1)
        group_stride, member_stride = 1, n_groups
    else:
        maxima = grouped.unflatten(1, (n_groups, group_size)).amax(2)
        group_stride, member_stride = group_size, 1
    starts = maxima.topk(k, dim=-1, sorted=False)[1] * group_stride
    members = torch.arange(group_size, device=rows.device) * member_stride
    if interleaved:
        positions = (starts[:, None, :] + members[:, None]).flatten(1)
    else:
        positions = (starts[:, :, None] + members).flatten(1)
    tail = torch.arange(n_groups * group_size, width, device=rows.device)
    return torch.cat([positions, tail.expand(n, -1)], dim=1) if tail.numel() else positions


def topk_fast(x: Tensor, k: int, *, sorted: bool = False) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row by the form that is fastest for the shape and device."""
    width = x.shape[-1]
    if width < MIN_ROW_PER_K * k:
        return topk_reference(x, k, sorted=sorted)
    on_cpu = x.device.type == "cpu"
    group_size = CPU_GROUP_SIZE if on_cpu else gpu_group_size(width, k)
    return topk_by_groups(x, k, group_size=group_size, interleaved=on_cpu, sorted=sorted)


def gpu_group_size(width: int, k: int) -> int:
    """Return the power of two at or above sqrt(width / k), where maxima and candidates balance."""
    group_size = 1
    while group_size * group_size * k < width:
        group_size *= 2
    return group_size


def topk(x: Tensor, k: int, *, sorted: bool = False, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Return the k largest of each row of x (..., F): values (..., k), int64 indices (..., k).

    Exact; NaN counts as largest. With `sorted` the values descend, else their order is
    unspecified. Ties may be broken otherwise than by `torch.topk`. Gradients reach x through the
    values.

    Raises ValueError for k outside [1, F], TypeError for an x that is not floating point.

    Source: Gaihre et al. 2021, "Dr. Top-k: Delegate-Centric Top-k on GPUs"; ours takes exactly k
    groups, for the reason in the module docstring.
    """
    check_floating(x=x)
    check_at_least_1d(x=x)
    check_k(k, x.shape[-1], "the row length")
    if use_reference(impl, "topk"):
        return topk_reference(x, k, sorted=sorted)
    return topk_fast(x, k, sorted=sorted)
