"""JumpReLU as a sparse code: what lies above its latent's threshold, and what lies just below.

Maths: with H the step function and K the rectangle, K(u) = 1 for |u| < 1/2 and else 0, the
activation is a = x·H(x − θ) and the number that fire is l0 = (1/n)·Σ H(x − θ). Their derivatives by
x are H(x − θ) and 0; by θ they have the straight-through pseudo-derivatives
∂a/∂θ = −(θ/ε)·K((x − θ)/ε) and ∂H(x − θ)/∂θ = −(1/ε)·K((x − θ)/ε), of bandwidth ε.
Two disjoint lists hold all pairs for which any of this is not zero:
latents: x > θ, with a = x; window: θ − ε/2 < x ≤ θ, the part of the STE window that did not fire,
with a = 0. (The part that fired is in latents: those with x − θ < ε/2.)
Shapes: x (n, F), theta (F,) or () → for each list values and indices (p,), offsets (n + 1,),
ascending by row, then column; l0 (). Sizes p depend on the data, or are given as capacities.
Dtypes: float16, bfloat16, float32, float64; values have x's and are its elements unchanged.
Comparisons are made in float32, or in float64 if x or theta is, and NaN on either side of one
selects nothing. Indices and offsets are int64.
Bytes: one read of x, a bit an element and list written and read again, and what is selected: above
the one read about 1/8 a list (16-bit x) or 1/16 (float32). The backward builds x's dense gradient.
Deterministic: yes, bitwise, forward and backward; no atomics.

Marks: the first kernel turns 32 neighbouring elements into the bits of one word, and counts the
bits of a chunk of a row. A running sum over the chunks says where each one's pairs begin. The
second kernel takes the bits off its words, lowest first, and fetches only elements that were
selected. So nothing is capped per row, and no buffer can overflow but one whose capacity the caller
chose.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Impl, check_finite_values, check_floating, check_same_device, choose_form
from .launching import cdiv, launch, tl, triton
from .ragged import Ragged, tokens_of_pairs
from .segments import by_latent, weighted_sums

WORD_BITS = 32
CAPACITY_NAMES = ("capacity", "window_capacity")
Capacities = tuple[int | None, ...]  # one a list: of `latents`, and with a bandwidth of `window`


class Selected(NamedTuple):
    """The pairs that decide a JumpReLU's output and its gradients; see `threshold_select`."""

    latents: Ragged  # x > θ, with their activations x
    window: Ragged | None  # θ − ε/2 < x ≤ θ, with their activations 0; None without a bandwidth
    l0: Tensor  # (), the mean number of latents a token


def threshold_select_reference(
    x: Tensor, theta: Tensor, *, bandwidth: float | None = None
) -> Selected:
    """Return the selection through dense masks, the pseudo-derivatives as plain autograd."""
    wide = _compare_dtype(x, theta)
    fixed = theta.detach().to(wide)
    fired = x.to(wide) > fixed
    near = torch.zeros_like(fired)
    if bandwidth is not None:
        near = (x.to(wide) - fixed).abs() < bandwidth / 2
    # It is 0, and its gradient to θ is K((x − θ)/ε)/ε.
    step = (theta.to(wide) - fixed).where(near, 0) / (bandwidth or 1.0)
    a = x.where(fired, 0) - (fixed.where(near, 0) * step).to(x.dtype)
    l0 = (fired.sum() - step.sum()) / max(x.shape[0], 1)
    window = None if bandwidth is None else _masked(a, near & ~fired)
    return Selected(_masked(a, fired), window, l0.to(wide))


def _masked(a: Tensor, mask: Tensor) -> Ragged:
    """Return the elements of a (n, F) where `mask` holds."""
    counts = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1)])
    return Ragged(a[mask], mask.nonzero(as_tuple=True)[1], counts.cumsum(0))


def _compare_dtype(x: Tensor, theta: Tensor) -> torch.dtype:
    """Return the dtype in which x and theta are compared."""
    is_double = torch.float64 in (x.dtype, theta.dtype)
    return torch.float64 if is_double else torch.float32


# ---- kernels


@triton.jit
def count_bits(words):
    """Return how many bits of each uint32 are set; LLVM knows the idiom and takes one `popc`."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    return (((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _mark_kernel(
    x,  # (n, F), rows `stride` apart
    theta,  # (F,), or () if ONE_THETA
    fired_words,  # (n, n_words) int32, out
    fired_counts,  # (n, n_chunks) int32, out
    near_words,  # the same of the window, or None
    near_counts,
    half_bandwidth,
    n,
    F,
    stride,
    n_words,
    ONE_THETA: tl.constexpr,
    CHUNK: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
):
    """Mark BR rows of a chunk of CHUNK words, BW words at a time, and count the marks."""
    chunk = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    bits = tl.arange(0, 32)
    powers = tl.full((32,), 1, tl.uint32) << bits.to(tl.uint32)
    fired_count = tl.zeros((BR, BW), tl.uint32)
    near_count = tl.zeros((BR, BW), tl.uint32)
    for first in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, n_words), BW):
        at = first + tl.arange(0, BW)
        cols = at[:, None] * 32 + bits[None, :]
        # A threshold of +inf selects nothing, so that columns past F need no mask of their own.
        if ONE_THETA:
            level = tl.where(cols < F, tl.load(theta).to(tl.float32), float("inf"))
        else:
            level = tl.load(theta + cols, mask=cols < F, other=float("inf")).to(tl.float32)
        level = level[None, :, :]
        values = tl.load(
            x + rows[:, None, None] * stride + cols[None, :, :],
            mask=(rows < n)[:, None, None] & (cols < F)[None, :, :],
            other=0.0,
        ).to(tl.float32)
        stored = rows[:, None] * n_words + at[None, :]
        real = (rows < n)[:, None] & (at < n_words)[None, :]
        fired = tl.sum(tl.where(values > level, powers[None, None, :], 0), axis=2)
        tl.store(fired_words + stored, fired.to(tl.int32, bitcast=True), mask=real)
        fired_count += count_bits(fired)
        if near_words is not None:
            # No window lies around an infinity; NaN says so without inf − inf.
            level = tl.where(tl.abs(level) < float("inf"), level, float("nan"))
            near = level - values < half_bandwidth
            near = tl.sum(tl.where(near, powers[None, None, :], 0), axis=2)
            # What fired is taken out a word at a time: the arithmetic is as dear as the read.
            near = near & (near ^ fired)
            tl.store(near_words + stored, near.to(tl.int32, bitcast=True), mask=real)
            near_count += count_bits(near)
    counted = rows * tl.num_programs(1) + chunk
    total = tl.sum(fired_count.to(tl.int32), axis=1)
    tl.store(fired_counts + counted, total, mask=rows < n)
    if near_words is not None:
        total = tl.sum(near_count.to(tl.int32), axis=1)
        tl.store(near_counts + counted, total, mask=rows < n)


@triton.jit
def _unmark_kernel(
    words,  # (n, n_words) int32
    ends,  # (n · n_chunks,) int64, the running sum of the chunks' counts
    x,  # (n, F), rows `stride` apart, or None
    values,  # (p,) out, or None
    indices,  # (p,) int64, out
    stride,
    n_words,
    p,
    CHUNK: tl.constexpr,
):
    """Write the pairs of a chunk of CHUNK words of a row, behind its predecessors'."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    # A thread's words lie apart, as what it gathers does: else every round moves data between two
    # arrangements. A warp still reads 128 bytes at once.
    apart = tl.max_contiguous(at, 1)
    left = tl.load(words + row * n_words + apart, mask=at < n_words, other=0)
    left = left.to(tl.uint32, bitcast=True)
    count = count_bits(left).to(tl.int32)
    end = tl.load(ends + row * tl.num_programs(1) + tl.program_id(1))
    start = end - tl.sum(count, axis=0)
    # Pairs count from `start`: 32 bits each are enough, and registers are what limits the kernel.
    limit = tl.minimum(tl.maximum(p - start, 0), CHUNK * 32).to(tl.int32)
    pair = tl.cumsum(count, 0) - count
    # Every round takes the lowest bit off each word that has one left.
    for _ in range(tl.max(count, axis=0)):  # pyright: ignore[reportArgumentType]
        some = (left != 0) & (pair < limit)
        others = left & (left - 1)
        col = at * 32 + count_bits((left ^ others) - 1).to(tl.int32)
        tl.store(indices + start + pair, col.to(tl.int64), mask=some)
        if x is not None:
            value = tl.load(x + row * stride + col, mask=some, other=0.0)
            tl.store(values + start + pair, value, mask=some)
        left = others
        pair += 1


# Words a chunk, a program's work in either kernel: rows up to 32768 wide are one, a long row is
# cut so that few rows fill a GPU as well as many. A power of two, and at least the 32 of a block.
CHUNK = 1024
# Rows a program marks together: they share one read of theta, which in float32 is twice as many
# bytes as a row of 16-bit x.
ROWS = 4


class Marks(NamedTuple):
    """A list's pairs as bits of words (n, n_words) int32, and counts (n, n_chunks) int32."""

    words: Tensor
    counts: Tensor


def launch_marks(x: Tensor, theta: Tensor, half_bandwidth: float | None) -> list[Marks]:
    """Return the marks of `latents` and, with a bandwidth, of `window`."""
    n, width = x.shape
    n_words = cdiv(width, WORD_BITS)
    n_chunks = cdiv(n_words, CHUNK)
    marks = [
        Marks(
            x.new_empty((n, n_words), dtype=torch.int32),
            x.new_empty((n, n_chunks), dtype=torch.int32),
        )
        for _ in range(1 if half_bandwidth is None else 2)
    ]
    launch(
        _mark_kernel,
        (cdiv(n, ROWS), n_chunks),
        *(x, theta, *marks[0], *(marks[1] if len(marks) == 2 else (None, None))),
        *(half_bandwidth or 0.0, n, width, x.stride(0), n_words),
        num_warps=4,
        ONE_THETA=theta.dim() == 0,
        CHUNK=CHUNK,
        BR=ROWS,
        # 16 bytes a thread and row.
        BW=64 // x.element_size(),
    )
    return marks


def launch_pairs(
    words: Tensor, ends: Tensor, x: Tensor | None, p: int, is_padded: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the values, if there is an x to take them from, and the indices of p pairs."""
    n, n_words = words.shape
    make = words.new_zeros if is_padded else words.new_empty
    values = None if x is None else make((p,), dtype=x.dtype)
    indices = make((p,), dtype=torch.int64)
    launch(
        _unmark_kernel,
        (n, cdiv(n_words, CHUNK)),
        *(words, ends, x, values, indices),
        *(0 if x is None else x.stride(0), n_words, p),
        num_warps=4,
        CHUNK=CHUNK,
    )
    return values, indices


def triton_lists(
    x: Tensor, theta: Tensor, half_bandwidth: float | None, capacities: Capacities
) -> list[Ragged]:
    """Select by the kernels."""
    marks = launch_marks(x, theta, half_bandwidth)
    ends = [counts.view(-1).cumsum(0) for _, counts in marks]
    lists = []
    for i, size in enumerate(_sizes(ends, capacities)):
        words, counts = marks[i]
        source, is_padded = x if i == 0 else None, capacities[i] is not None
        values, indices = launch_pairs(words, ends[i], source, size, is_padded)
        if values is None:
            values = x.new_zeros(size)
        lists.append(Ragged(values, indices, _offsets(ends[i], counts.shape[1], size)))
    return lists


# ---- torch forms


def torch_lists(
    x: Tensor, theta: Tensor, half_bandwidth: float | None, capacities: Capacities
) -> list[Ragged]:
    """Select as the kernels do, with a byte where they have a bit."""
    (n, width), n_words = x.shape, cdiv(x.shape[1], WORD_BITS)
    level = theta.to(_compare_dtype(x, theta)).expand(width)
    marks = x.new_zeros((len(capacities), n, n_words * WORD_BITS), dtype=torch.bool)
    marks[0, :, :width] = x > level
    if half_bandwidth is not None:
        marks[1, :, :width] = ((x - level).abs_() < half_bandwidth) & (x <= level)
    words = marks.view(len(capacities), n * n_words, WORD_BITS)
    counts = words.sum(2)
    ends = list(counts.cumsum(1))
    lists = []
    for i, size in enumerate(_sizes(ends, capacities)):
        pairs = torch.arange(size, device=x.device)
        word = torch.searchsorted(ends[i], pairs, right=True).clamp(max=n * n_words - 1)
        rank = pairs - (ends[i][word] - counts[i][word])
        bit = (words[i][word].cumsum(1) > rank[:, None]).to(torch.uint8).argmax(1)
        is_real = pairs < ends[i][-1]
        indices = (word % n_words * WORD_BITS + bit).where(is_real, 0)
        values = x[word // n_words, indices].where(is_real, 0) if i == 0 else x.new_zeros(size)
        lists.append(Ragged(values, indices, _offsets(ends[i], n_words, size)))
    return lists


# Elements that a CPU compares at once, so that the outcome stays in its cache.
CPU_BLOCK = 1 << 18


def cpu_lists(
    x: Tensor, theta: Tensor, half_bandwidth: float | None, capacities: Capacities
) -> list[Ragged]:
    """Select with one comparison an element, and all else among the few that pass it."""
    n, width = x.shape
    wide = _compare_dtype(x, theta)
    level = least = theta.to(wide).expand(width)
    if half_bandwidth is not None:
        # Low enough that whatever lies in the window is above it, rounding included.
        slack = 4 * torch.finfo(wide).eps * (level.abs() + half_bandwidth)
        least = level - half_bandwidth - slack
    n_rows = max(CPU_BLOCK // width, 1)
    found = []
    for first in range(0, n, n_rows):
        above = x[first : first + n_rows].to(wide) > least
        found.append(np.flatnonzero(above.numpy()) + first * width)
    positions = torch.from_numpy(np.concatenate(found))
    tokens, indices = positions // width, positions % width
    values, level = x[tokens, indices], level[indices]
    masks = [values > level]
    if half_bandwidth is not None:
        masks.append(((values - level).abs() < half_bandwidth) & (values <= level))
    kept = [torch.from_numpy(np.flatnonzero(mask.numpy())) for mask in masks]
    row_ends = torch.arange(1, n + 1) * width
    ends = [torch.searchsorted(positions[one], row_ends) for one in kept]
    lists = []
    for i, size in enumerate(_sizes(ends, capacities)):
        chosen = values[kept[i]] if i == 0 else x.new_zeros(kept[i].numel())
        code = Ragged(chosen, indices[kept[i]], _offsets(ends[i], 1, size))
        lists.append(_padded(code, size))
    return lists


# ---- sizes


def _sizes(ends: list[Tensor], capacities: Capacities) -> list[int]:
    """Return each list's p: its capacity, or its total; one wait for a GPU reads all totals.

    More pairs than a capacity are an error: a ValueError, or an error of the GPU where all
    capacities are given, since to look at the total would be to wait.
    """
    totals = [end[-1] for end in ends]
    given = [capacity for capacity in capacities if capacity is not None]
    if not _host_knows(totals[0]) and len(given) == len(totals):
        for total, name, size in zip(totals, CAPACITY_NAMES, given, strict=False):
            message = _overflow_message(name, size, "more")
            torch._assert_async(total <= size, message)  # pyright: ignore[reportPrivateImportUsage]
        return given
    sizes = []
    read = torch.stack(totals).tolist()
    for total, name, capacity in zip(read, CAPACITY_NAMES, capacities, strict=False):
        if capacity is not None and total > capacity:
            raise ValueError(_overflow_message(name, capacity, total))
        sizes.append(total if capacity is None else capacity)
    return sizes


def _host_knows(total: Tensor) -> bool:
    """Return whether to read `total` is not to wait for a GPU."""
    return not total.is_cuda


def _overflow_message(name: str, capacity: int | None, total: int | str) -> str:
    return (
        f"`{name}` must be at least the number of pairs; got {name}={capacity} and {total} pairs. "
        "Raise it, or leave it out to have the exact size at the cost of a host sync."
    )


def _offsets(ends: Tensor, per_row: int, size: int) -> Tensor:
    """Return (n + 1,) offsets of a running count that has `per_row` entries a row.

    None is above `size`, so that nothing reads past the end before an overflow surfaces.
    """
    row_ends = ends.view(-1, per_row)[:, -1]
    return torch.cat([row_ends.new_zeros(1), row_ends]).clamp(max=size)


def _padded(code: Ragged, size: int) -> Ragged:
    """Return the code with value 0 and index 0 up to `size` pairs."""
    missing = (0, size - code.values.numel())
    return Ragged(F.pad(code.values, missing), F.pad(code.indices, missing), code.offsets)


# ---- ops


@torch.library.custom_op("sae_kernels::threshold_select", mutates_args=())
def select_pairs(
    x: Tensor,
    theta: Tensor,
    half_bandwidth: float | None,
    capacity: int | None,
    window_capacity: int | None,
    with_triton: bool,
) -> list[Tensor]:
    """Return values, indices, offsets of `latents` and, with a bandwidth, those of `window`."""
    capacities = _capacities(half_bandwidth, capacity, window_capacity)
    if not x.shape[0]:
        lists = [_no_rows(x, size or 0) for size in capacities]
    elif with_triton:
        rows = x if x.stride(1) == 1 else x.contiguous()
        lists = triton_lists(rows, theta.contiguous(), half_bandwidth, capacities)
    else:
        select = cpu_lists if x.is_cpu else torch_lists
        lists = select(x, theta, half_bandwidth, capacities)
    return [tensor for code in lists for tensor in code]


@select_pairs.register_fake
def _(
    x: Tensor,
    theta: Tensor,
    half_bandwidth: float | None,
    capacity: int | None,
    window_capacity: int | None,
    with_triton: bool,
) -> list[Tensor]:
    made = []
    for size in _capacities(half_bandwidth, capacity, window_capacity):
        p = torch.library.get_ctx().new_dynamic_size() if size is None else size
        offsets = x.new_empty((x.shape[0] + 1,), dtype=torch.int64)
        made += [x.new_empty((p,)), x.new_empty((p,), dtype=torch.int64), offsets]
    return made


def _capacities(
    half_bandwidth: float | None, capacity: int | None, window_capacity: int | None
) -> Capacities:
    return (capacity,) if half_bandwidth is None else (capacity, window_capacity)


def _no_rows(x: Tensor, size: int) -> Ragged:
    """Return the code of no tokens, which is all padding."""
    indices = x.new_zeros(size, dtype=torch.int64)
    return Ragged(x.new_zeros(size), indices, x.new_zeros(1, dtype=torch.int64))


@torch.library.custom_op("sae_kernels::sums_by_latent", mutates_args=())
def sums_by_latent(weights: Tensor, indices: Tensor, width: int) -> Tensor:
    """Return (width,): for each latent the sum of the `weights` (p,) of its pairs, in order."""
    return weighted_sums(by_latent(indices[:, None], width), weights)


@sums_by_latent.register_fake
def _(weights: Tensor, indices: Tensor, width: int) -> Tensor:
    return weights.new_empty((width,))


def jumprelu_theta_grad(
    selected: Selected,
    grad_latents: Tensor,
    grad_window: Tensor,
    theta: Tensor,
    bandwidth: float,
    grad_l0: Tensor | float = 0.0,
) -> Tensor:
    """Return dL/dθ, shaped as theta, from the gradients of the selected pairs and of l0.

    For a trainer that computes gradients by hand: dL/da of pair (i, j) is
    ⟨dL/dx_hat[i], W_dec[j]⟩, of all `latents` in grad_latents (p,) and of all `window` in
    grad_window. `selected`, `theta` and `bandwidth` are those of the selection. The sums are in at
    least float32, the result has theta's dtype; what stands at padding is ignored.

    Source: Rajamanoharan et al. 2024, "Jumping Ahead", the pseudo-derivatives in this module's
    docstring.
    """
    latents, window = selected.latents, selected.window
    if window is None:
        raise ValueError(
            "`selected` must have a window; got None. Give `threshold_select` the bandwidth."
        )
    wide = _compare_dtype(latents.values, theta)
    level = theta.detach().to(wide)
    grad_count = grad_l0 / max(latents.offsets.numel() - 1, 1)
    weights = []
    for code, grad in ((latents, grad_latents), (window, grad_window)):
        at = level if level.dim() == 0 else level[code.indices]
        in_window = _is_real(code)
        if code is latents:
            in_window = in_window & ((code.values.detach() - at).abs() < bandwidth / 2)
        weights.append((-(at * grad.to(wide) + grad_count) / bandwidth).where(in_window, 0))
    if level.dim() == 0:
        return torch.cat(weights).sum().to(theta.dtype)
    indices = torch.cat([latents.indices, window.indices])
    return sums_by_latent(torch.cat(weights), indices, theta.shape[0]).to(theta.dtype)


def _is_real(code: Ragged) -> Tensor:
    """Return (p,): which pairs are no padding."""
    return torch.arange(code.indices.numel(), device=code.indices.device) < code.offsets[-1]


class _ThresholdSelect(torch.autograd.Function):
    """The lists and l0; their gradients reach x as they are, and theta straight through."""

    @staticmethod
    def forward(ctx, x, theta, bandwidth, capacity, window_capacity, with_triton):
        half = None if bandwidth is None else bandwidth / 2
        made = select_pairs(x, theta, half, capacity, window_capacity, with_triton)
        l0 = made[2][-1].to(_compare_dtype(x, theta)) / max(x.shape[0], 1)
        ctx.save_for_backward(theta, *made)
        ctx.shape, ctx.bandwidth = x.shape, bandwidth
        ctx.mark_non_differentiable(*made[1:3], *made[4:6])
        return (l0, *made)

    @staticmethod
    def backward(ctx, *grads):
        theta, *made = ctx.saved_tensors
        needs_x, needs_theta = ctx.needs_input_grad[:2]
        latents, window = Ragged(*made[:3]), Ragged(*made[3:]) if len(made) == 6 else None
        grad_x = _scattered(latents, grads[1], ctx.shape) if needs_x else None
        grad_theta = None
        if needs_theta and window is not None:
            selected = Selected(latents, window, made[2][-1])
            pairs = grads[1], grads[4], theta
            grad_theta = jumprelu_theta_grad(selected, *pairs, ctx.bandwidth, grads[0])
        return grad_x, grad_theta, None, None, None, None


def _scattered(code: Ragged, grad: Tensor, shape: torch.Size) -> Tensor:
    """Return zeros of `shape` (n, F) with the pairs' gradients in their places."""
    n, width = shape
    tokens = tokens_of_pairs(code.offsets, code.indices.numel())
    # One element behind the last takes the padding.
    positions = (tokens * width + code.indices).clamp(max=n * width)
    flat = grad.new_zeros(n * width + 1).index_put((positions,), grad)
    return flat[:-1].view(n, width)


def threshold_select(
    x: Tensor,
    theta: Tensor,
    *,
    bandwidth: float | None = None,
    capacity: int | None = None,
    window_capacity: int | None = None,
    impl: Impl = "auto",
    check_finite: bool = False,
) -> Selected:
    """Return the pairs of x (n, F) above theta, and with `bandwidth` those just below it.

    x holds pre-activations, theta (F,) a threshold per latent or () one for all. `latents`
    are all pairs with x > theta, strictly, their values elements of x. With `bandwidth` ε > 0, in
    the units of x, `window` are all with |x − theta| < ε/2 that are not in `latents`, their
    activations 0. NaN is selected by nothing, and a theta of +inf turns its latent off. `l0` is
    the mean number of latents a token, in at least float32.

    To train a JumpReLU, decode both lists and add:

        (a, j, ends), (a0, j0, ends0), l0 = threshold_select(pre_acts, theta, bandwidth=0.001)
        x_hat = sparse_decode(a, j, W_dec, b_dec, offsets=ends)
        x_hat = x_hat + sparse_decode(a0, j0, W_dec, offsets=ends0)
        loss = (x_hat - target).square().sum(-1).mean() + l0_coefficient * l0

    The window decodes to zeros, and brings the gradient of theta for latents that would appear. The
    lists are disjoint, so no pair is decoded twice, W_dec's gradient counts each once, and any
    other loss of the activations may be summed over both. Gradients: of `latents.values` to x; of
    both lists' values, and of `l0`, to theta by the pseudo-derivatives in this module's docstring.
    Without a bandwidth theta gets none. `jumprelu_theta_grad` is the same for gradients by hand.

    Sizes are data. With `capacity` (and `window_capacity`) None, a GPU is waited for once, to read
    them. With both given nothing waits: p is the capacity, and pairs after `offsets[-1]` are
    padding, value 0 and index 0. More pairs than the capacity are never dropped: they raise
    ValueError where the host knows the count, and are a device-side assertion on a GPU where it
    does not; that ends the process's use of the GPU, so leave room.

    Raises ValueError or TypeError for shapes, dtypes, devices or numbers that do not fit, and with
    `check_finite`, which reads the data, for NaN or infinities in x or theta.

    Source: Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with
    JumpReLU Sparse Autoencoders", the loss's pseudo-derivatives (section 3) with their rectangle
    kernel. Ours selects where they mask dense arrays; window and latents together are their window
    and their active latents.
    """
    _check_arguments(x, theta, bandwidth, capacity, window_capacity)
    check_finite_values(check_finite, x=x, theta=theta)
    form = choose_form(impl, "threshold_select", x, theta)
    if form == "reference":
        found = threshold_select_reference(x, theta, bandwidth=bandwidth)
        return _with_capacities(found, capacity, window_capacity)
    arguments = x, theta, bandwidth, capacity, window_capacity, form == "triton"
    l0, *made = _ThresholdSelect.apply(*arguments)
    window = Ragged(*made[3:]) if bandwidth is not None else None
    return Selected(Ragged(*made[:3]), window, l0)


def _with_capacities(
    found: Selected, capacity: int | None, window_capacity: int | None
) -> Selected:
    """Return the reference's selection with its lists padded to their capacities."""
    lists = [found.latents] if found.window is None else [found.latents, found.window]
    capacities = (capacity, window_capacity)[: len(lists)]
    sizes = _sizes([code.offsets for code in lists], capacities)
    padded = [_padded(code, size) for code, size in zip(lists, sizes, strict=True)]
    return Selected(padded[0], padded[1] if len(padded) == 2 else None, found.l0)


def _check_arguments(
    x: Tensor,
    theta: Tensor,
    bandwidth: float | None,
    capacity: int | None,
    window_capacity: int | None,
) -> None:
    check_floating(x=x, theta=theta)
    check_same_device(x=x, theta=theta)
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(
            f"`x` must have shape (n, F) with F ≥ 1; got {tuple(x.shape)}. "
            "Flatten the leading axes with `x.flatten(0, -2)`."
        )
    if theta.dim() and theta.shape != x.shape[1:]:
        raise ValueError(
            f"`theta` must have shape (F={x.shape[1]},) or (); got {tuple(theta.shape)}. "
            "Pass one threshold per column of x, or one for all."
        )
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(
            f"`bandwidth` must be positive and finite; got {bandwidth}. "
            "Pass the width of the window around theta, or None for no window."
        )
    if window_capacity is not None and bandwidth is None:
        raise ValueError(
            f"`window_capacity` must come with a `bandwidth`; got window_capacity="
            f"{window_capacity} and no bandwidth. Give both or neither."
        )
    for name, size in zip(CAPACITY_NAMES, (capacity, window_capacity), strict=True):
        if size is not None and size < 0:
            raise ValueError(f"`{name}` must be at least 0; got {size}. Pass a number of pairs.")
