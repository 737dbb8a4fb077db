"""The exact top-k of a whole batch: the k_total largest elements of x, wherever they lie.

Maths: order the elements by value, NaN largest, −0 equal to +0, equal ones by flat position with
the lowest first; keep the first k_total. That order is total, so the answer is unique. The
threshold is the smallest kept value.
Shapes: x (n, F) → values (k_total,), indices (k_total,) int64 columns, offsets (n + 1,) int64,
ascending by flat position; threshold (). Dtypes: values and threshold of x's, elements unchanged.
Bytes: one read of x, plus about 10 to 25% of it for the maxima and the members of the groups that
survive; with ties at the threshold or k_total near n·F, up to a read of x per pass below.
Deterministic: yes, bitwise; no float is added, and no atomic is used. Gradient: grad_values
scattered into zeros of x's shape; the threshold has none.

Group maxima: at least k_total groups have a maximum ≥ the k_total-th largest maximum t0, and each
holds an element ≥ t0. So t0 bounds the threshold t from below, and whatever is ≥ t lies in a group
whose maximum is ≥ t0: the others are never read again. t0 may be rounded down, t may not.
Thresholds are found digit by digit, histogram by histogram, on order-preserving integer keys
(keys.py): always the same number of passes, no guess, no buffer that can overflow.

Rows are cut into chunks of groups. A chunk of a row is a *segment*, the unit of parallel work, so
that one long row is spread as well as many short ones.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import Impl, check_finite_values, check_floating, check_shape, choose_form
from .keys import KEY_BITS, order_key
from .launching import cdiv, launch, next_power_of_2, tl, triton
from .ragged import Ragged, tokens_of_pairs

# Below SMALLEST_GROUP (k_total above a 16th of x) a direct selection was as fast on CPU. There, of
# 1..64, groups of about sqrt(n·F / k_total) were among the fastest for k_total of 1000 to 600 000
# out of 19 million: 42 ms for 131 072 where a flat torch.topk took 415 (float32, one thread).
SMALLEST_GROUP = 4
LARGEST_CPU_GROUP = 32
LARGEST_GPU_GROUP = 64  # beyond it the maxima are below 5% of the bytes of x
# A 16 KB tile of bf16 in flight for 128 threads: eight 128-bit loads each.
MAXIMA_TILE = 8192
# 2048 members are the average a segment keeps at d_sae 131 072, k 64, with chunks of 4096 groups
# of 32: one step of a program's loop, 16 elements a thread.
MEMBER_TILE = 2048
LARGEST_CHUNK = 4096  # groups in a segment; their ids fit 16 bits
DIRECT_GROUP, DIRECT_CHUNK = 32, 512  # where every group is a candidate
COUNT_BLOCK = 2048
MOST_PROGRAMS = 1024  # that keep a histogram, about 8 for each of an H200's 132 processors

# On an H200 (triton 3.6) the kernels were exact at d_sae 131,072, k 64, and wrong at 24,576, k 32,
# and at 4096, k 60, by a histogram's mask (`histogram_where`). That is mended, but no GPU has shown
# it yet: till the tests at real sizes pass on one, `auto` takes the torch form there.
TRITON_IS_TRUSTED = False

Selection = tuple[Tensor, Tensor, Tensor, Tensor]  # values, indices, offsets, threshold


def batch_topk_reference(x: Tensor, k_total: int) -> tuple[Ragged, Tensor]:
    """Return the k_total largest elements of x (n, F) and the threshold by stable sorting."""
    n, width = x.shape
    flat = x.reshape(-1)
    # NaN apart, and by numbers: a GPU's descending sort of a few doubles puts NaN last.
    is_nan = flat.isnan()
    values = flat.detach().masked_fill(is_nan, float("inf"))
    order = torch.sort(values, descending=True, stable=True)[1]
    order = order[torch.sort(is_nan[order].int(), descending=True, stable=True)[1]][:k_total]
    positions = order.sort()[0]
    offsets = torch.searchsorted(positions, torch.arange(n + 1, device=x.device) * width)
    return Ragged(flat[positions], positions % width, offsets), flat[order[-1]].detach()


# ---- torch forms: positions of the winners in flat x, ascending, and the threshold


def first_largest(values: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Return the k ascending positions of those above `threshold` and of the first equal to it.

    `threshold` is the k-th largest of `values` (p,). Nothing waits for a GPU: the j-th position
    kept is where the running count reaches j.
    """
    is_nan, threshold_is_nan = values.isnan(), threshold.isnan()
    above = (values > threshold) | (is_nan & ~threshold_is_nan)
    equal = (values == threshold) | (is_nan & threshold_is_nan)
    wanted = k - above.sum()
    keep = above | (equal & (equal.cumsum(0) <= wanted))
    nth = torch.arange(1, k + 1, device=values.device)
    return torch.searchsorted(keep.cumsum(0), nth)


def batch_topk_by_groups(x: Tensor, k_total: int, *, group_size: int) -> Selection:
    """Select without a host sync: exactly k_total groups of flat x, then among their members.

    Groups are consecutive, so the first of equal maxima hold the first of equal elements, and the
    k_total groups contain exactly the answer, ties included. Needs k_total ≤ the number of groups,
    or `group_size` 1. Elements after the last whole group are always candidates.
    """
    flat = x.reshape(-1)
    if group_size == 1:
        threshold = flat.topk(k_total)[0][-1]
        return _selected(x, first_largest(flat, threshold, k_total), threshold)
    n_whole = flat.numel() // group_size
    maxima = flat[: n_whole * group_size].view(n_whole, group_size).amax(1)
    groups = first_largest(maxima, maxima.topk(k_total)[0][-1], k_total)
    members = torch.arange(group_size, device=x.device)
    tail = torch.arange(n_whole * group_size, flat.numel(), device=x.device)
    candidates = torch.cat([(groups[:, None] * group_size + members).view(-1), tail])
    values = flat[candidates]
    threshold = values.topk(k_total)[0][-1]
    return _selected(x, candidates[first_largest(values, threshold, k_total)], threshold)


def batch_topk_on_cpu(x: Tensor, k_total: int, *, group_size: int) -> Selection:
    """Select on the CPU: what is ≥ t0, and an exact selection among it by NumPy's partition.

    Groups are interleaved: member m of group g is element m·n_groups + g, which a CPU reduces with
    vector instructions.
    """
    flat = x.reshape(-1)
    if group_size == 1:
        threshold = _kth_largest(flat, k_total)
        return _selected(x, _first_at_least(flat, threshold, k_total), threshold)
    values, positions = _at_least_t0(flat, k_total, group_size)
    threshold = _kth_largest(values, k_total)
    kept = positions[_first_at_least(values, threshold, k_total)]
    return _selected(x, kept, threshold)


def _at_least_t0(flat: Tensor, k_total: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the elements ≥ t0 and their ascending positions: all that may be among the k_total."""
    n_groups = flat.numel() // group_size
    grouped = flat[: n_groups * group_size].view(group_size, n_groups)
    maxima = grouped.amax(0)
    t0 = _kth_largest(maxima, k_total)
    groups = _positions_of(~(maxima < t0))  # not ≥, so that NaN stays
    members = grouped.index_select(1, groups).view(-1)
    found = _positions_of(~(members < t0))
    positions = found // groups.numel() * n_groups + groups[found % groups.numel()]
    tail = torch.arange(n_groups * group_size, flat.numel())
    return torch.cat([members[found], flat[tail]]), torch.cat([positions, tail])


def _first_at_least(values: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Return what `first_largest` does, by sizes that depend on the data, as a CPU may."""
    threshold_is_nan = bool(threshold.isnan())
    found = _positions_of(values.isnan() if threshold_is_nan else ~(values < threshold))
    surplus = found.numel() - k
    if surplus:
        ties = torch.arange(found.numel())
        if not threshold_is_nan:
            ties = _positions_of(values[found] == threshold)
        keep = torch.ones_like(found, dtype=torch.bool)
        keep[ties[-surplus:]] = False
        found = found[keep]
    return found


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """Return the k-th largest of CPU `values` (p,), NaN largest, as a scalar of their dtype."""
    exact = values if values.dtype == torch.float64 else values.float()
    rank = values.numel() - k
    return torch.from_numpy(np.partition(exact.numpy(), rank)[rank : rank + 1])[0].to(values.dtype)


def _positions_of(mask: Tensor) -> Tensor:
    """Return where the CPU `mask` (p,) holds; NumPy finds it several times faster than torch."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _selected(x: Tensor, positions: Tensor, threshold: Tensor) -> Selection:
    """Return values, indices, offsets and threshold of the ascending flat `positions`."""
    n, width = x.shape
    offsets = torch.searchsorted(positions, torch.arange(n + 1, device=x.device) * width)
    # A copy: an op must not return a part of another tensor.
    return x.reshape(-1)[positions], positions % width, offsets, threshold.clone()


def group_size_for(n_elements: int, k_total: int, largest: int) -> int:
    """Return a power of two of about sqrt(n_elements / k_total), or 1 where groups save nothing.

    There the maxima (n_elements / G) and the members of k_total groups (k_total · G) balance.
    """
    group_size = 1
    while group_size < largest and 4 * group_size * group_size * k_total <= n_elements:
        group_size *= 2
    return group_size if group_size >= SMALLEST_GROUP else 1


# ---- kernels


@triton.jit
def larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(n, bound: tl.constexpr):
    """Return the int64 `n`, or `bound` where it is less, as int32: so masks compare in 32 bits."""
    return tl.minimum(n, bound).to(tl.int32)


@triton.jit
def exact_key(x, BITS: tl.constexpr):
    """Return order_key of the float32 `x`, with −0 made equal to +0."""
    return order_key(tl.where(x == 0.0, 0.0, x), BITS)


@triton.jit
def digit_of(keys, prefix, SHIFT: tl.constexpr, PREVIOUS: tl.constexpr, BITS: tl.constexpr):
    """Return the digit of `keys` from bit SHIFT to bit PREVIOUS, and which keys share `prefix`.

    `prefix` holds the bits from PREVIOUS up; there are none before the first digit, which holds
    the sign and is moved to start from 0.
    """
    if PREVIOUS == BITS:
        digit = (keys >> SHIFT) + (1 << (BITS - 1 - SHIFT))
        same = keys == keys
    else:
        digit = (keys >> SHIFT) & ((1 << (PREVIOUS - SHIFT)) - 1)
        same = (keys >> PREVIOUS) == (prefix >> PREVIOUS)
    return digit, same


@triton.jit
def histogram_where(counted, digit, SIZE: tl.constexpr):
    """Count the digits of a tile of SIZE elements; those that do not count are zeros.

    The lowest digit's count is therefore too high, which `pick_digit_kernel` never looks at. Not
    tl.histogram's mask: triton 3.6 lets the compiler reorder a tile before it is counted, and
    reorders values and mask apart where their layouts differ.
    """
    return tl.histogram(tl.reshape(tl.where(counted, digit, 0), (SIZE,)), 256)


@triton.jit
def pick_digit_kernel(
    totals_ptr,  # (256,) int64: keys of each digit, of the lowest one no fewer than there are
    state_ptr,  # (2,) int64: the prefix of the k-th largest key; how many to keep of those below
    threshold_ptr,  # () of x's dtype, or None until the last digit
    k,
    SHIFT: tl.constexpr,
    PREVIOUS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Append the next digit to the prefix: the largest with enough keys at or above it."""
    prefix, wanted = tl.full((), -(2 ** (BITS - 1)), tl.int64), tl.zeros((), tl.int64) + k
    if PREVIOUS < BITS:
        prefix, wanted = tl.load(state_ptr), tl.load(state_ptr + 1)
    digits = tl.arange(0, 256)
    totals = tl.load(totals_ptr + digits)
    at_least = tl.sum(totals, axis=0) - tl.cumsum(totals, 0) + totals
    digit = tl.sum((at_least >= wanted).to(tl.int32), axis=0) - 1
    wanted -= tl.sum(tl.where(digits > digit, totals, 0), axis=0)
    prefix += digit.to(tl.int64) << SHIFT
    tl.store(state_ptr, prefix)
    tl.store(state_ptr + 1, wanted)
    if threshold_ptr is not None:
        # The inverse of order_key: bits that it shifted out of a negative key were ones.
        key = prefix.to(tl.int32)
        key = (key << (32 - BITS)) | ((key >> 31) & ((1 << (32 - BITS)) - 1))
        bits = key ^ ((key >> 31) & 0x7FFFFFFF)
        value = bits.to(tl.float32, bitcast=True)
        tl.store(threshold_ptr, value.to(threshold_ptr.dtype.element_ty))


@triton.jit
def group_maxima_kernel(
    x_ptr,
    maxima_ptr,  # (n, n_groups) int16
    width,
    n_groups,
    stride,
    n_tiles,
    G: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    """Write 16-bit keys of the maxima of one tile of groups of one row, rounded down."""
    program = tl.program_id(0).to(tl.int64)
    row = program // n_tiles
    first = (program % n_tiles) * TILE_GROUPS
    group = tl.arange(0, TILE_GROUPS)
    member = group[:, None] * G + tl.arange(0, G)[None, :]
    x = tl.load(
        x_ptr + row * stride + first * G + member,
        mask=member < at_most(width - first * G, TILE_GROUPS * G),
        other=-float("inf"),
    )
    maxima = tl.reduce(x.to(tl.float32), 1, larger_or_nan)
    key = exact_key(maxima, 16).to(tl.int16)
    tl.store(
        maxima_ptr + row * n_groups + first + group,
        key,
        mask=group < at_most(n_groups - first, TILE_GROUPS),
    )


@triton.jit
def maxima_digit_kernel(
    maxima_ptr,
    state_ptr,
    histograms_ptr,  # (programs, 256) int32
    n_maxima,
    SHIFT: tl.constexpr,
    PREVIOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count a digit of the maxima's keys: each program those of every programs-th block."""
    program = tl.program_id(0).to(tl.int64)
    prefix = tl.zeros((), tl.int32)
    if PREVIOUS < 16:
        prefix = tl.load(state_ptr).to(tl.int32)
    block = tl.arange(0, BLOCK)
    histogram = tl.zeros((256,), tl.int32)
    for start in range(program * BLOCK, n_maxima, tl.num_programs(0) * BLOCK):
        inside = block < at_most(n_maxima - start, BLOCK)
        keys = tl.load(maxima_ptr + start + block, mask=inside, other=0).to(tl.int32)
        digit, same = digit_of(keys, prefix, SHIFT, PREVIOUS, 16)
        histogram += histogram_where(inside & same, digit, BLOCK)
    tl.store(histograms_ptr + program * 256 + tl.arange(0, 256), histogram)


@triton.jit
def surviving_groups_kernel(
    maxima_ptr,
    state_ptr,  # t0 as a 16-bit key
    ids_ptr,  # (segments, CHUNK) int16: survivors within their segment, ascending
    counts_ptr,  # (segments,) int32
    n_groups,
    n_chunks,
    CHUNK: tl.constexpr,
):
    """List the groups of one segment whose maximum is at least t0."""
    segment = tl.program_id(0).to(tl.int64)
    row = segment // n_chunks
    first = (segment % n_chunks) * CHUNK
    group = tl.arange(0, CHUNK)
    inside = group < at_most(n_groups - first, CHUNK)
    keys = tl.load(maxima_ptr + row * n_groups + first + group, mask=inside, other=0)
    survives = inside & (keys.to(tl.int32) >= tl.load(state_ptr).to(tl.int32))
    slots = tl.cumsum(survives.to(tl.int32), 0)
    tl.store(ids_ptr + segment * CHUNK + slots - 1, group.to(tl.int16), mask=survives)
    tl.store(counts_ptr + segment, tl.sum(survives.to(tl.int32), axis=0))


@triton.jit
def segment_of(counts_ptr, segment, width, stride, n_chunks, G: tl.constexpr, CHUNK: tl.constexpr):
    """Return where a segment starts in memory, its number of columns and of candidate groups."""
    column = (segment % n_chunks) * (CHUNK * G)
    columns = at_most(width - column, CHUNK * G)
    count = tl.cdiv(columns, G) if counts_ptr is None else tl.load(counts_ptr + segment)
    return (segment // n_chunks) * stride + column, columns, count


@triton.jit
def load_members(
    x_ptr,
    ids_ptr,
    segment,
    start,
    count,
    columns,
    BITS: tl.constexpr,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    """Return the elements of TILE_GROUPS candidates, their keys, columns in the segment, mask."""
    slot = start + tl.arange(0, TILE_GROUPS)
    group = slot
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + segment * CHUNK + slot, mask=slot < count, other=0)
        group = ids.to(tl.int32)
    local = group[:, None] * G + tl.arange(0, G)[None, :]
    inside = (slot < count)[:, None] & (local < columns)
    x = tl.load(x_ptr + local, mask=inside, other=0.0)
    return x, exact_key(x.to(tl.float32), BITS), local, inside


@triton.jit
def member_digit_kernel(
    x_ptr,
    ids_ptr,  # None where every group is a candidate, as is counts_ptr
    counts_ptr,
    state_ptr,
    histograms_ptr,  # (programs, 256) int32
    width,
    stride,
    n_chunks,
    n_segments,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    PREVIOUS: tl.constexpr,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    """Count a digit of the candidates' keys: each program those of every programs-th segment."""
    program = tl.program_id(0).to(tl.int64)
    prefix = tl.zeros((), tl.int32)
    if PREVIOUS < BITS:
        prefix = tl.load(state_ptr).to(tl.int32)
    histogram = tl.zeros((256,), tl.int32)
    for segment in range(program, n_segments, tl.num_programs(0)):
        where, columns, count = segment_of(counts_ptr, segment, width, stride, n_chunks, G, CHUNK)
        for start in range(0, count, TILE_GROUPS):
            _x, keys, _local, inside = load_members(
                x_ptr + where, ids_ptr, segment, start, count, columns, BITS, G, CHUNK, TILE_GROUPS
            )
            digit, same = digit_of(keys, prefix, SHIFT, PREVIOUS, BITS)
            histogram += histogram_where(inside & same, digit, TILE_GROUPS * G)
    tl.store(histograms_ptr + program * 256 + tl.arange(0, 256), histogram)


@triton.jit
def both_counts(above, equal):
    """Return two masks as ones in the halves of an int32: a tile has fewer than 2¹⁵ elements."""
    return above.to(tl.int32) + (equal.to(tl.int32) << 16)


@triton.jit
def count_members_kernel(
    x_ptr,
    ids_ptr,
    counts_ptr,
    state_ptr,
    above_ptr,  # (segments,) int32: candidates above the threshold
    equal_ptr,  # (segments,) int32: candidates equal to it
    width,
    stride,
    n_chunks,
    BITS: tl.constexpr,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    t = tl.load(state_ptr).to(tl.int32)
    where, columns, count = segment_of(counts_ptr, segment, width, stride, n_chunks, G, CHUNK)
    above, equal = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for start in range(0, count, TILE_GROUPS):
        _x, keys, _local, inside = load_members(
            x_ptr + where, ids_ptr, segment, start, count, columns, BITS, G, CHUNK, TILE_GROUPS
        )
        in_tile = tl.sum(tl.sum(both_counts(inside & (keys > t), inside & (keys == t)), 1), 0)
        above += in_tile & 0xFFFF
        equal += in_tile >> 16
    tl.store(above_ptr + segment, above)
    tl.store(equal_ptr + segment, equal)


@triton.jit
def sums_up_to(x):
    """Return the sums of a 2-D int32 `x` up to and with each element, in row-major order."""
    rows = tl.sum(x, axis=1)
    return tl.cumsum(x, 1) + (tl.cumsum(rows, 0) - rows)[:, None]


@triton.jit
def write_members_kernel(
    x_ptr,
    ids_ptr,
    counts_ptr,
    state_ptr,
    begins_ptr,  # (segments,) int64: where the output of each begins
    ties_ptr,  # (segments,) int64: how many elements equal to the threshold it keeps
    values_ptr,
    indices_ptr,
    width,
    stride,
    n_chunks,
    BITS: tl.constexpr,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    """Write the kept elements of one segment and their columns, ascending.

    Before an element that is kept lie all those above the threshold, and of those equal to it as
    many as may be kept: that is its place.
    """
    segment = tl.program_id(0).to(tl.int64)
    t = tl.load(state_ptr).to(tl.int32)
    begin = tl.load(begins_ptr + segment)
    ties = tl.load(ties_ptr + segment).to(tl.int32)
    where, columns, count = segment_of(counts_ptr, segment, width, stride, n_chunks, G, CHUNK)
    column = (segment % n_chunks) * (CHUNK * G)
    above_before, equal_before = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for start in range(0, count, TILE_GROUPS):
        x, keys, local, inside = load_members(
            x_ptr + where, ids_ptr, segment, start, count, columns, BITS, G, CHUNK, TILE_GROUPS
        )
        above, equal = inside & (keys > t), inside & (keys == t)
        both = both_counts(above, equal)
        counts = sums_up_to(both)
        n_above = above_before + (counts & 0xFFFF)
        n_equal = equal_before + (counts >> 16)
        keep = above | (equal & (n_equal <= ties))
        place = begin + n_above + tl.minimum(n_equal, ties) - 1
        tl.store(values_ptr + place, x, mask=keep)
        tl.store(indices_ptr + place, column + local, mask=keep)
        in_tile = tl.sum(tl.sum(both, 1), 0)
        above_before += in_tile & 0xFFFF
        equal_before += in_tile >> 16


# ---- launchers


class Cut(NamedTuple):
    """How x (n, F) is cut: rows into groups of `group` elements and into chunks of `chunk` groups.

    With `all_groups` no maxima are taken and every group is a candidate.
    """

    group: int
    chunk: int
    all_groups: bool

    def n_groups(self, width: int) -> int:
        return cdiv(width, self.group)

    def n_chunks(self, width: int) -> int:
        return cdiv(width, self.group * self.chunk)

    def constants(self) -> dict[str, int]:
        tile_groups = max(1, min(self.chunk, MEMBER_TILE // self.group))
        return {"G": self.group, "CHUNK": self.chunk, "TILE_GROUPS": tile_groups}


def cut_for(n: int, width: int, k_total: int) -> Cut:
    """Return the cut of x (n, width) for which its reads should be fewest."""
    group = group_size_for(n * width, k_total, LARGEST_GPU_GROUP)
    if group == 1:
        return Cut(
            DIRECT_GROUP, min(DIRECT_CHUNK, next_power_of_2(cdiv(width, DIRECT_GROUP))), True
        )
    return Cut(group, min(LARGEST_CHUNK, next_power_of_2(cdiv(width, group))), False)


def digits_of(bits: int) -> list[tuple[int, int]]:
    """Return (SHIFT, PREVIOUS) of each digit of up to 8 bits, from the sign down."""
    return [(max(previous - 8, 0), previous) for previous in range(bits, 0, -8)]


def launch_threshold(
    count_digit: Any, n_programs: int, k_total: int, bits: int, like: Tensor, out: Tensor | None
) -> Tensor:
    """Return (2,) int64: the k_total-th largest key, and how many equal to it are to be kept.

    `count_digit(state, histograms, SHIFT, PREVIOUS)` launches the counting of one digit. The last
    digit writes the key as a float to `out`, if given.
    """
    state = like.new_empty(2, dtype=torch.int64)
    for shift, previous in digits_of(bits):
        histograms = like.new_empty((n_programs, 256), dtype=torch.int32)
        count_digit(state, histograms, shift, previous)
        launch(
            pick_digit_kernel,
            (1,),
            histograms.sum(0),
            state,
            out if shift == 0 else None,
            k_total,
            SHIFT=shift,
            PREVIOUS=previous,
            BITS=bits,
        )
    return state


def launch_surviving_groups(x: Tensor, k_total: int, cut: Cut) -> tuple[Tensor, Tensor]:
    """Return the survivors' ids (segments, chunk) int16 and counts (segments,) int32."""
    n, width = x.shape
    n_groups, n_chunks = cut.n_groups(width), cut.n_chunks(width)
    maxima = x.new_empty((n, n_groups), dtype=torch.int16)
    tile_groups = min(next_power_of_2(n_groups), MAXIMA_TILE // cut.group)
    n_tiles = cdiv(n_groups, tile_groups)
    launch(
        group_maxima_kernel,
        (n * n_tiles,),
        x,
        maxima,
        width,
        n_groups,
        x.stride(0),
        n_tiles,
        G=cut.group,
        TILE_GROUPS=tile_groups,
    )
    block = min(COUNT_BLOCK, next_power_of_2(maxima.numel()))
    n_programs = min(MOST_PROGRAMS, cdiv(maxima.numel(), block))

    def count_digit(state: Tensor, histograms: Tensor, shift: int, previous: int) -> None:
        launch(
            maxima_digit_kernel,
            (n_programs,),
            maxima,
            state,
            histograms,
            maxima.numel(),
            SHIFT=shift,
            PREVIOUS=previous,
            BLOCK=block,
        )

    t0 = launch_threshold(count_digit, n_programs, k_total, 16, x, None)
    ids = x.new_empty((n * n_chunks, cut.chunk), dtype=torch.int16)
    counts = x.new_empty(n * n_chunks, dtype=torch.int32)
    launch(
        surviving_groups_kernel,
        (n * n_chunks,),
        maxima,
        t0,
        ids,
        counts,
        n_groups,
        n_chunks,
        CHUNK=cut.chunk,
    )
    return ids, counts


def launch_batch_topk(x: Tensor, k_total: int, cut: Cut | None = None) -> Selection:
    """Select with Triton; `cut` as `cut_for` chooses unless given."""
    n, width = x.shape
    x = x if x.stride(1) == 1 or width == 1 else x.contiguous()
    cut = cut or cut_for(n, width, k_total)
    n_chunks = cut.n_chunks(width)
    n_segments = n * n_chunks
    ids, counts = (None, None) if cut.all_groups else launch_surviving_groups(x, k_total, cut)
    bits, constants = KEY_BITS[x.dtype], cut.constants()
    n_programs = min(MOST_PROGRAMS, n_segments)

    def count_digit(state: Tensor, histograms: Tensor, shift: int, previous: int) -> None:
        launch(
            member_digit_kernel,
            (n_programs,),
            x,
            ids,
            counts,
            state,
            histograms,
            width,
            x.stride(0),
            n_chunks,
            n_segments,
            BITS=bits,
            SHIFT=shift,
            PREVIOUS=previous,
            **constants,
        )

    threshold = x.new_empty(())
    state = launch_threshold(count_digit, n_programs, k_total, bits, x, threshold)
    above = x.new_empty(n_segments, dtype=torch.int32)
    equal = torch.empty_like(above)
    shape = width, x.stride(0), n_chunks
    launch(
        count_members_kernel,
        (n_segments,),
        *(x, ids, counts, state, above, equal, *shape),
        BITS=bits,
        **constants,
    )
    begins, ties, offsets = places_of_segments(above, equal, state[1], n_chunks)
    values = x.new_empty(k_total)
    indices = x.new_empty(k_total, dtype=torch.int64)
    launch(
        write_members_kernel,
        (n_segments,),
        *(x, ids, counts, state, begins, ties, values, indices, *shape),
        BITS=bits,
        **constants,
    )
    return values, indices, offsets, threshold


def places_of_segments(
    above: Tensor, equal: Tensor, wanted: Tensor, n_chunks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each segment's output begins, how many ties it keeps, and the rows' offsets.

    The first `wanted` () of the elements equal to the threshold are kept.
    """
    ties_before = equal.cumsum(0) - equal
    ties = torch.minimum((wanted - ties_before).clamp_(min=0), equal)
    kept = above + ties
    ends = kept.cumsum(0)
    offsets = torch.nn.functional.pad(ends[n_chunks - 1 :: n_chunks], (1, 0))
    return ends - kept, ties, offsets


# ---- the op


@torch.library.custom_op("sae_kernels::batch_topk", mutates_args=())
def batch_topk_rows(
    x: Tensor, k_total: int, with_triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, indices, offsets and the threshold of the k_total largest of x (n, F)."""
    if with_triton:
        return launch_batch_topk(x, k_total)
    largest = LARGEST_CPU_GROUP if x.is_cpu else LARGEST_GPU_GROUP
    group_size = group_size_for(x.numel(), k_total, largest)
    if x.is_cpu:
        return batch_topk_on_cpu(x, k_total, group_size=group_size)
    return batch_topk_by_groups(x, k_total, group_size=group_size)


@batch_topk_rows.register_fake
def _(
    x: Tensor,
    k_total: int,
    with_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    integers = {"dtype": torch.int64, "device": x.device}
    return (
        x.new_empty(k_total),
        torch.empty(k_total, **integers),
        torch.empty(x.shape[0] + 1, **integers),
        x.new_empty(()),
    )


def _save_places(ctx: Any, inputs: tuple[Any, ...], output: Selection) -> None:
    _, indices, offsets, threshold = output
    ctx.mark_non_differentiable(indices, offsets, threshold)
    ctx.save_for_backward(indices, offsets)
    ctx.shape = inputs[0].shape


def _scatter_grad(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
    """Return grad_values scattered into zeros: each place is written once, so in no order."""
    grad_values = grads[0]
    if grad_values is None:
        return None, None, None
    indices, offsets = ctx.saved_tensors
    n, width = ctx.shape
    positions = tokens_of_pairs(offsets, indices.numel()) * width + indices
    grad_x = grad_values.new_zeros(n * width).scatter_(0, positions, grad_values)
    return grad_x.view(n, width), None, None


batch_topk_rows.register_autograd(_scatter_grad, setup_context=_save_places)


def batch_topk(
    x: Tensor, k_total: int, *, impl: Impl = "auto", check_finite: bool = False
) -> tuple[Ragged, Tensor]:
    """Return the k_total largest elements of all of x (n, F), and the smallest of them.

    Exact, with no cap per row: one row may hold them all, another none. NaN counts as largest; of
    elements equal to the smallest one kept, the first in row-major order are kept. The result is
    Ragged(values (k_total,), indices (k_total,) int64 columns, offsets (n + 1,)), ascending in
    each row, and the threshold () of x's dtype, NaN only if all that is kept is NaN. Gradients
    reach x through the values. Nothing is clipped at 0: a ReLU is the caller's.

    `check_finite` reads the data to check that x is finite.
    Raises ValueError for an x that is not (n, F) and a k_total outside [1, n·F], TypeError for an
    x that is not floating point.

    Source: Bussmann et al. 2024, "BatchTopK Sparse Autoencoders", §3; ours states the ties.
    """
    check_floating(x=x)
    check_shape("x", x, {"n": None, "F": None})
    if not 1 <= k_total <= x.numel():
        raise ValueError(
            f"`k_total` must be in [1, n·F]; got k_total={k_total}, n·F={x.numel()}. "
            "Lower `k_total` or pass more tokens."
        )
    check_finite_values(check_finite, x=x)
    form = choose_form(impl, "batch_topk", x)
    if form == "reference":
        return batch_topk_reference(x, k_total)
    with_triton = form == "triton" and (impl == "triton" or TRITON_IS_TRUSTED)
    values, indices, offsets, threshold = batch_topk_rows(x, k_total, with_triton)
    return Ragged(values, indices, offsets), threshold
