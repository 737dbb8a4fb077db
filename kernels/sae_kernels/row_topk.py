"""Exact top-k of each row.

Maths: the k largest elements of a row of F, NaN counting as largest, as `torch.topk` has it.
Shapes: x (..., F) floating → values (..., k) of x's dtype, indices (..., k) int64. Values are bits
of x. Gradient: grad_values scattered into zeros of x's shape.
Dtypes: any floating; the kernels take float16, bfloat16 and float32.
Bytes: one read of x, F·itemsize a row; the `streaming` kernel reads a row three to five times.
Deterministic: yes; among equal elements which one is taken is unspecified.

Group maxima: cut a row into groups; the k groups with the largest maxima hold at least k elements
≥ the smallest of those maxima, and everything outside them is ≤ it. So their members always
contain a valid top-k set: exact, with no threshold to guess and no buffer to overflow.

Three kernels, one program a row: `direct` holds the whole row in registers; `groups` the maxima of
its groups, then those of the pieces of k groups, then the elements of k pieces; `streaming` only
blocks of it, for any k and F.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    Impl,
    check_at_least_1d,
    check_finite_values,
    check_floating,
    check_k,
    choose_form,
)
from .keys import KEY_BITS, kth_largest, load_keys, lowest_key, order_key
from .launching import cdiv, launch, next_power_of_2, tl, triton

# Below 64 elements for each one kept, the candidates (k · group size) cost what the groups save.
MIN_ROW_PER_K = 64
# Of 2..32, groups of 8 were among the fastest on CPU for F 4608..24576 and k 32..128: 1.1 to 3
# times faster than torch.topk, most on the longest rows.
CPU_GROUP_SIZE = 8
CPU_GROUP_OF_GROUPS = 4  # their maxima are searched in the same way: another tenth off


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
    starts = _largest_groups(maxima, k, interleaved) * group_stride
    members = torch.arange(group_size, device=rows.device) * member_stride
    if interleaved:
        positions = (starts[:, None, :] + members[:, None]).flatten(1)
    else:
        positions = (starts[:, :, None] + members).flatten(1)
    tail = torch.arange(n_groups * group_size, width, device=rows.device)
    return torch.cat([positions, tail.expand(n, -1)], dim=1) if tail.numel() else positions


def _largest_groups(maxima: Tensor, k: int, interleaved: bool) -> Tensor:
    """Return the positions (n, k) of the k largest maxima, on a CPU by maxima of them in turn."""
    if interleaved and maxima.shape[1] // CPU_GROUP_OF_GROUPS >= 2 * k:
        return topk_by_groups(maxima, k, group_size=CPU_GROUP_OF_GROUPS, interleaved=True)[1]
    return maxima.topk(k, dim=-1, sorted=False)[1]


def topk_fast(x: Tensor, k: int, *, sorted: bool = False) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row by the torch form that is fastest for shape and device."""
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


@triton.jit
def nan_max(a, b):
    """Return the larger of two floats, NaN if either is one: a single instruction on a GPU."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def places(above, equal, first_above, first_equal):
    """Return where each marked element of a block goes: those above one after the other, then
    those equal, each kind from its own start.

    One scan counts both kinds, in the halves of an int32: blocks hold at most 16384 elements.
    """
    ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    return tl.where(above, first_above + (ranks & 0xFFFF), first_equal + (ranks >> 16)) - 1


@triton.jit
def winners(keys, k, BITS: tl.constexpr):
    """Return the mask of exactly k largest of the int32 `keys`, and each one's place in [0, k)."""
    t = kth_largest(keys, k, BITS)
    above = keys > t
    equal = keys == t
    place = places(above, equal, 0, tl.sum(above.to(tl.int32), axis=0))
    return above | (equal & (place < k)), place


@triton.jit
def copy_winners(x_ptr, values_ptr, indices_ptr, offsets, take, place):
    """Write x[offsets] and `offsets` to `place`. Reading x again keeps the bits of NaN and −0."""
    x = tl.load(x_ptr + offsets, mask=take, other=0.0)
    tl.store(values_ptr + place, x, mask=take)
    tl.store(indices_ptr + place, offsets.to(tl.int64), mask=take)


@triton.jit
def direct_kernel(
    x_ptr,
    values_ptr,
    indices_ptr,
    width,
    k,
    row_stride,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    """Select from the whole row, in registers: BLOCK ≥ width."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    offsets = tl.arange(0, BLOCK)
    take, place = winners(load_keys(x_ptr, offsets, offsets < width, BITS), k, BITS)
    copy_winners(x_ptr, values_ptr + row * k, indices_ptr + row * k, offsets, take, place)


@triton.jit
def piece_maxima(x):
    """Return the float32 maxima of the pieces x (P, PIECE), NaN for a piece that holds one."""
    return tl.reduce(x.to(tl.float32), 1, nan_max)


@triton.jit
def pieces_of_groups(
    groups_ptr,
    k,
    width,
    N_GROUPS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    K2: tl.constexpr,
):
    """Return the numbers (K2·PIECES,) of the pieces of k groups, and which of them are in the row.

    Piece p starts at p·PIECE.
    """
    slot = tl.arange(0, K2 * PIECES) // PIECES
    chosen = tl.load(groups_ptr + slot, mask=slot < k, other=0)
    piece = tl.arange(0, K2 * PIECES) % PIECES * N_GROUPS + chosen
    return piece, (slot < k) & (piece * PIECE < width)


@triton.jit
def groups_kernel(
    x_ptr,
    values_ptr,
    indices_ptr,
    width,
    k,
    row_stride,
    N_GROUPS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    K2: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BITS: tl.constexpr,
):
    """Select k of N_GROUPS groups by their maxima, k of those groups' pieces by theirs, and k of
    those pieces' elements.

    A piece is PIECE neighbours, what one thread loads at once. Group g holds the pieces at
    m·TILE + g·PIECE for m = 0, 1, …, TILE being N_GROUPS·PIECE ≤ width. So a row streams in whole
    lines, the maxima stay in their thread's registers with no exchange between threads, and an
    element costs its conversion to float32 and one float maximum: no key is built before there are
    only N_GROUPS of them. That maximum may take −0 for +0, which are equal as values, and nothing
    else. Past the end of the row −inf stands in. As TILE ≤ width, piece 0 of each group is in the
    row, and pieces that are not have the lowest key, so each selection finds k in the row.

    K2 ≥ k and PIECES ≥ the pieces of a group are powers of two.
    """
    TILE: tl.constexpr = N_GROUPS * PIECE
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    indices_ptr += row * k
    group = tl.arange(0, N_GROUPS)
    lane = tl.arange(0, PIECE)[None, :]
    tile = group[:, None] * PIECE + lane
    # Bits, not floats, go round the loop: Triton 3.6 fails on a float maximum of reductions there.
    bits = tl.full((N_GROUPS,), float("-inf"), tl.float32).to(tl.int32, bitcast=True)
    for start in range(0, width - TILE + 1, TILE):
        of_tile = piece_maxima(tl.load(x_ptr + start + tile))
        maxima = nan_max(bits.to(tl.float32, bitcast=True), of_tile)
        bits = maxima.to(tl.int32, bitcast=True)
    maxima = bits.to(tl.float32, bitcast=True)
    if HAS_TAIL:
        tail = width // TILE * TILE + tile
        of_tail = piece_maxima(tl.load(x_ptr + tail, mask=tail < width, other=float("-inf")))
        maxima = nan_max(maxima, of_tail)
    take, place = winners(order_key(maxima, BITS), k, BITS)
    # The row of indices serves as scratch for the chosen groups and pieces. A barrier before each
    # overwriting, one after it.
    scratch_ptr = indices_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(scratch_ptr + place, group, mask=take)
    tl.debug_barrier()
    piece, real = pieces_of_groups(scratch_ptr, k, width, N_GROUPS, PIECE, PIECES, K2)
    offsets = tl.where(real, piece, 0)[:, None] * PIECE + lane
    if HAS_TAIL:
        maxima = piece_maxima(tl.load(x_ptr + offsets, mask=offsets < width, other=float("-inf")))
    else:
        maxima = piece_maxima(tl.load(x_ptr + offsets))
    keys = tl.where(real, order_key(maxima, BITS), lowest_key(BITS))
    take, place = winners(keys, k, BITS)
    tl.debug_barrier()
    # Read again rather than kept in registers all through the search.
    piece, _ = pieces_of_groups(scratch_ptr, k, width, N_GROUPS, PIECE, PIECES, K2)
    tl.debug_barrier()
    tl.store(scratch_ptr + place, piece, mask=take)
    tl.debug_barrier()
    slot = tl.arange(0, K2)
    chosen = tl.load(scratch_ptr + slot, mask=slot < k, other=0)
    offsets = chosen[:, None] * PIECE + lane
    real = (slot < k)[:, None] & (offsets < width)
    keys = tl.reshape(load_keys(x_ptr, offsets, real, BITS), (K2 * PIECE,))
    take, place = winners(keys, k, BITS)
    tl.debug_barrier()
    offsets = tl.reshape(offsets, (K2 * PIECE,))
    copy_winners(x_ptr, values_ptr + row * k, indices_ptr, offsets, take, place)


@triton.jit
def unsigned_keys(x_ptr, lane, real, BITS: tl.constexpr):
    """Return keys in the order of `load_keys`, as uint32 of as many whole bytes as BITS takes."""
    BYTES: tl.constexpr = (BITS + 7) // 8
    key = load_keys(x_ptr, lane, real, BITS) << (32 - BITS)
    return (key.to(tl.uint32, bitcast=True) ^ 0x80000000) >> (32 - 8 * BYTES)


@triton.jit
def byte_counts(x_ptr, width, prefix, shift, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Return (256,) counts of the byte at `shift` in the row's keys that `prefix` begins."""
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros((256,), tl.int64)
    for start in range(0, width, BLOCK):
        real = lane < width - start
        begun = unsigned_keys(x_ptr + start, lane, real, BITS) >> shift
        mask = real & (begun >> 8 == prefix)
        counts += tl.histogram((begun & 255).to(tl.int32), 256, mask=mask)
    return counts


@triton.jit
def streaming_kernel(
    x_ptr,
    values_ptr,
    indices_ptr,
    width,
    k,
    row_stride,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    """Find the k-th largest key byte by byte, one read of the row each, then copy in one more."""
    BYTES: tl.constexpr = (BITS + 7) // 8
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    values_ptr += row * k
    indices_ptr += row * k
    width = tl.cast(width, tl.int64)
    t = tl.zeros((), tl.uint32)
    wanted = tl.zeros((), tl.int64) + k  # of the keys that t begins
    for step in range(BYTES):
        counts = byte_counts(x_ptr, width, t, 8 * (BYTES - 1 - step), BLOCK, BITS)
        n_higher = tl.sum(counts, axis=0) - tl.cumsum(counts, 0)
        # The byte sought is the lowest with too few above it: these descend, so count the others.
        byte = tl.sum((n_higher >= wanted).to(tl.int32), axis=0)
        wanted -= tl.sum(tl.where(tl.arange(0, 256) > byte, counts, 0), axis=0)
        t = (t << 8) | byte.to(tl.uint32)
    lane = tl.arange(0, BLOCK)
    n_above = tl.zeros((), tl.int64)
    n_equal = k - wanted  # the equal ones stand behind all that are above
    for start in range(0, width, BLOCK):
        real = lane < width - start
        key = unsigned_keys(x_ptr + start, lane, real, BITS)
        above = key > t
        equal = key == t
        place = places(above, equal, n_above, n_equal)
        take = above | (equal & (place < k))
        copy_winners(x_ptr, values_ptr, indices_ptr, start + lane, take, place)
        n_above += tl.sum(above.to(tl.int32), axis=0)
        n_equal += tl.sum(equal.to(tl.int32), axis=0)


# What a program's registers hold: the keys of a selection, 8 a thread of 32 warps; the pieces whose
# maxima it takes at once, 4 a thread.
MAX_KEYS = 8192
MAX_PIECES = 4096
# 8 loads for each thread of one warp: with fewer on their way a row streams slower.
MIN_GROUPS = 256
# One load of a thread.
PIECE_BYTES = 16
# A block of the streaming kernel: 8 elements for each thread of 8 warps.
STREAMING_BLOCK = 2048
# With fewer rows than this most of a GPU idles while each row is read several times by one
# program; torch.topk spreads a row over the GPU.
MIN_ROWS_STREAMING = 32


class Groups(NamedTuple):
    """How a row is cut: `n_groups` of up to `pieces` pieces of `piece` elements, powers of two."""

    n_groups: int
    pieces: int
    piece: int

    def selections(self, k: int) -> tuple[int, int, int]:
        """Return how many groups, pieces and elements k are selected from, in turn."""
        k2 = next_power_of_2(k)
        return self.n_groups, k2 * self.pieces, k2 * self.piece


def cut_in_groups(width: int, k: int, n_groups: int, piece: int) -> Groups | None:
    """Return the cut into `n_groups` ≥ k, or None where one would be empty or k are too many."""
    if n_groups * piece > width:
        return None
    groups = Groups(n_groups, next_power_of_2(cdiv(width, n_groups * piece)), piece)
    _, n_pieces, n_candidates = groups.selections(k)
    return groups if n_pieces <= MAX_PIECES and n_candidates <= MAX_KEYS else None


def best_groups(width: int, k: int, itemsize: int) -> Groups | None:
    """Return the cut that selects from the fewest elements in all, or None where none fits."""
    best, n_groups = None, max(next_power_of_2(k), MIN_GROUPS)
    while n_groups <= MAX_PIECES:
        groups = cut_in_groups(width, k, n_groups, PIECE_BYTES // itemsize)
        if groups and (best is None or sum(groups.selections(k)) < sum(best.selections(k))):
            best = groups
        n_groups *= 2
    return best


def choose_kernel(width: int, k: int, itemsize: int) -> Groups | str:
    """Return the cut into groups where that kernel suits best, else "direct" or "streaming".

    Selecting costs instructions in proportion to the elements selected from, and in the end binds
    more than the one read does: so groups where they halve that number.
    """
    block = next_power_of_2(width)
    groups = best_groups(width, k, itemsize)
    if block > MAX_KEYS:
        return groups or "streaming"
    return groups if groups and 2 * sum(groups.selections(k)) <= block else "direct"


def _warps(n: int) -> int:
    """Return the warps of a program that selects from n elements.

    Eight elements a thread; from 4096 on as few as 32 warps give, since a program of 16 warps would
    need so many registers that it had the processor to itself all the same.
    """
    return 32 if n >= 4096 else max(n // 256, 1)


def _outputs(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def launch_direct(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of the rows of x (n, F); `MAX_KEYS` bounds F."""
    n, width = x.shape
    values, indices = _outputs(x, k)
    block = max(next_power_of_2(width), 16)
    launch(
        direct_kernel,
        (n,),
        x,
        values,
        indices,
        width,
        k,
        x.stride(0),
        BLOCK=block,
        BITS=KEY_BITS[x.dtype],
        num_warps=_warps(block),
    )
    return values, indices


def launch_groups(x: Tensor, k: int, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return the k largest of the rows of x (n, F), cut into `groups`."""
    n, width = x.shape
    values, indices = _outputs(x, k)
    n_groups, n_pieces, n_candidates = groups.selections(k)
    launch(
        groups_kernel,
        (n,),
        x,
        values,
        indices,
        width,
        k,
        x.stride(0),
        N_GROUPS=n_groups,
        PIECE=groups.piece,
        PIECES=groups.pieces,
        K2=next_power_of_2(k),
        HAS_TAIL=width % (n_groups * groups.piece) != 0,
        BITS=KEY_BITS[x.dtype],
        num_warps=_warps(max(n_groups, n_pieces, n_candidates)),
    )
    return values, indices


def launch_streaming(x: Tensor, k: int, block: int = STREAMING_BLOCK) -> tuple[Tensor, Tensor]:
    """Return the k largest of the rows of x (n, F), any k and F, `block` elements at a time."""
    n, width = x.shape
    values, indices = _outputs(x, k)
    launch(
        streaming_kernel,
        (n,),
        x,
        values,
        indices,
        width,
        k,
        x.stride(0),
        BLOCK=block,
        BITS=KEY_BITS[x.dtype],
        num_warps=_warps(block),
    )
    return values, indices


def launch_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of the rows of x (n, F) by the kernel that suits F and k.

    Rows may lie at any stride; elements of a row that are not neighbours are copied first.
    """
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    chosen = choose_kernel(x.shape[1], k, x.itemsize)
    if isinstance(chosen, Groups):
        return launch_groups(x, k, chosen)
    return launch_direct(x, k) if chosen == "direct" else launch_streaming(x, k)


def topk_rows(x: Tensor, k: int, with_triton: bool) -> tuple[Tensor, Tensor]:
    """Return the k largest of the rows of x (n, F), without checks and without a gradient.

    For use inside other ops. x may be a view of rows at any stride.
    """
    return launch_topk(x, k) if with_triton else topk_fast(x.detach(), k)


@torch.library.custom_op("sae_kernels::topk", mutates_args=())
def topk_op(x: Tensor, k: int, sorted: bool, with_triton: bool) -> tuple[Tensor, Tensor]:
    """Return values and indices (n, k) of the k largest of the rows of x (n, F)."""
    if not with_triton:
        return topk_fast(x, k, sorted=sorted)
    values, indices = launch_topk(x, k)
    if sorted:
        values, order = values.sort(dim=1, descending=True)
        indices = indices.gather(1, order)
    return values, indices


@topk_op.register_fake
def _(x: Tensor, k: int, sorted: bool, with_triton: bool) -> tuple[Tensor, Tensor]:
    return _outputs(x, k)


def _save_indices(ctx, inputs, output) -> None:
    _, indices = output
    ctx.save_for_backward(indices)
    ctx.width = inputs[0].shape[1]


def _scatter_grad(ctx, grad, _):
    (indices,) = ctx.saved_tensors
    return grad.new_zeros((grad.shape[0], ctx.width)).scatter_(1, indices, grad), None, None, None


topk_op.register_autograd(_scatter_grad, setup_context=_save_indices)


def topk(
    x: Tensor,
    k: int,
    *,
    sorted: bool = False,
    impl: Impl = "auto",
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row of x (..., F): values (..., k), int64 indices (..., k).

    Exact, and values are bits of x; NaN counts as largest. With `sorted` the values descend, else
    their order is unspecified. Ties may be broken otherwise than by `torch.topk`. Gradients reach x
    through the values. Rows of a strided x are read where they are; elements that are not
    neighbours are copied.

    Raises ValueError for k outside [1, F], and with `check_finite` (which waits for a GPU) for NaN
    or infinities in x; TypeError for an x that is not floating point; RuntimeError for
    impl="triton" where Triton cannot run.

    Source: Gaihre et al. 2021, "Dr. Top-k: Delegate-Centric Top-k on GPUs"; ours takes exactly k
    groups, for the reason in the module docstring.
    """
    check_floating(x=x)
    check_at_least_1d(x=x)
    width = x.shape[-1]
    check_k(k, width, "the row length")
    check_finite_values(check_finite, x=x)
    form = choose_form(impl, "topk", x)
    if form == "reference":
        return topk_reference(x, k, sorted=sorted)
    rows = x.reshape(x.shape[:-1].numel(), width)
    with_triton = form == "triton" and (impl == "triton" or not _too_few_rows(rows, k))
    values, indices = topk_op(rows, k, sorted, with_triton)
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)


def _too_few_rows(rows: Tensor, k: int) -> bool:
    """Return whether torch.topk is expected to be faster: a few long rows, read several times."""
    n, width = rows.shape
    return n < MIN_ROWS_STREAMING and choose_kernel(width, k, rows.itemsize) == "streaming"
