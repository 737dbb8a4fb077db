"""The (token, latent) pairs of a sparse code, regrouped by latent: one sort, two gradients.

A code of n tokens holds p pairs in token order (CSR). A gradient of a weight row needs the pairs of
one latent together (CSC): row l is Σ over the pairs of l of weights[pair] · rows[token of pair].
A stable sort by latent id keeps tokens ascending inside a segment, so each row is summed in one
fixed order: no atomics, and bitwise the same result on every run and for any number of threads.

Bytes: p·d·itemsize, one gather of the rows, and d_sae·d·itemsize written.
Cost of the sort: 1 to 3 ms for 131072 pairs on one CPU core, about 1% of a training step. That is
why the decoder's and the encoder's gradient each sort for themselves and no cache is shared.

Hubs: a latent that fires on thousands of tokens would keep one program busy while all others are
done. So the sorted pairs are cut into tiles at fixed positions; a tile that lies wholly inside one
segment is summed by a program of its own first, and the segment's program adds the tiles' sums in
between what lies before the first and after the last of them. The grid never depends on the data.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .launching import cdiv, launch, tl, triton
from .ragged import tokens_of_pairs

_RADIX_BITS = 16
# Pairs a tile. A segment's program reads at most twice as many rows, and one sum a tile: at 128 a
# latent that fires on all of 8192 tokens is at most 254 rows and 64 sums.
TILE = 128


class Segments(NamedTuple):
    """Pairs sorted by latent: those of latent j are `order[offsets[j]:offsets[j + 1]]`.

    Padding of a ragged code sorts behind them all, and is in no segment.
    """

    order: Tensor  # (p,) int64, positions in the flattened code
    tokens: Tensor  # (p,) int64, the token of each sorted pair
    latents: Tensor  # (p,) integers, the latent of each sorted pair
    offsets: Tensor  # (d_sae + 1,) int64
    may_pad: bool  # whether pairs may lie behind the last segment


def by_latent(indices: Tensor, d_sae: int, offsets: Tensor | None = None) -> Segments:
    """Sort the pairs of `indices` (n, k) int64 stably by latent id, without a host sync on GPU.

    With `offsets` (n + 1,) the code is ragged and `indices` is (p,).
    """
    keys = indices.reshape(-1)
    if offsets is not None:
        tokens = tokens_of_pairs(offsets, keys.numel())
        keys = keys.where(tokens < offsets.numel() - 1, d_sae)
    if keys.is_cpu:
        order = _radix_argsort(keys, d_sae + 1)
        latents = keys[order]
    else:
        # CUDA's radix sort takes time with the key's bytes.
        narrow = keys.to(torch.int32) if d_sae < 2**31 else keys
        latents, order = torch.sort(narrow, stable=True)
    bounds = torch.arange(d_sae + 1, device=keys.device, dtype=latents.dtype)
    sorted_tokens = order // indices.shape[-1] if offsets is None else tokens[order]
    ends = torch.searchsorted(latents, bounds)
    return Segments(order, sorted_tokens, latents, ends, offsets is not None)


def _radix_argsort(keys: Tensor, bound: int) -> Tensor:
    """Return the stable order of int64 CPU `keys` (p,) in [0, bound), 16 bits a pass.

    NumPy's stable sort of uint16 is a radix sort: a tenth of its int64 merge sort. torch.sort has
    a radix sort too, as fast on idle cores, but its thread barriers stall for 100 ms as soon as
    another process takes one of the cores.
    """
    digits = keys.numpy()
    order = np.argsort(digits.astype(np.uint16), kind="stable")
    for shift in range(_RADIX_BITS, max(bound - 1, 1).bit_length(), _RADIX_BITS):
        digit = (digits >> shift).astype(np.uint16)[order]
        order = order[np.argsort(digit, kind="stable")]
    return torch.from_numpy(order)


@triton.jit
def _sum_pairs(
    order, tokens, weights, rows, low, high, cols, d, BP: tl.constexpr, BD: tl.constexpr
):
    """Return Σ weight · row over sorted pairs [low, high) at `cols`, and (BP,) partial Σ weight."""
    row_sum = tl.zeros((BD,), tl.float32)
    weight_sums = tl.zeros((BP,), tl.float32)
    for start in range(low, high, BP):
        pairs = start + tl.arange(0, BP)
        real = pairs < high
        at = tl.load(order + pairs, mask=real, other=0)
        weight = tl.load(weights + at, mask=real, other=0.0).to(tl.float32)
        token = tl.load(tokens + pairs, mask=real, other=0)
        row = tl.load(
            rows + token[:, None] * d + cols[None, :],
            mask=real[:, None] & (cols < d)[None, :],
            other=0.0,
        ).to(tl.float32)
        row_sum += tl.sum(weight[:, None] * row, axis=0)
        weight_sums += weight
    return row_sum, weight_sums


@triton.jit
def _tile_sums_kernel(
    order,  # (p,) int64
    tokens,  # (p,) int64
    latents,  # (p,) int32 or int64
    weights,  # (p,), unsorted
    rows,  # (n, d)
    tile_rows,  # (n_tiles, d) fp32
    tile_weights,  # (n_tiles,) fp32
    d_sae,
    d,
    TILE: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum the tile of sorted pairs [TILE·id, TILE·(id + 1)) if one latent has all of it."""
    tile = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    low = tile * TILE
    first = tl.load(latents + low)
    # d_sae stands for a ragged code's padding, which has no token.
    if (first == tl.load(latents + low + TILE - 1)) & (first < d_sae):
        row_sum, weight_sums = _sum_pairs(
            order, tokens, weights, rows, low, low + TILE, cols, d, BP, BD
        )
        tl.store(tile_rows + tile * d + cols, row_sum, mask=cols < d)
        if tl.program_id(1) == 0:
            tl.store(tile_weights + tile, tl.sum(weight_sums, axis=0))


@triton.jit
def sum_segment(
    latent,
    order,
    tokens,
    offsets,
    weights,
    rows,
    tile_rows,
    tile_weights,
    cols,
    d,
    TILE: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Return one latent's Σ weight · row at `cols` and Σ weight.

    In this order: the pairs before its whole tiles, the tiles, the pairs after them.
    """
    low = tl.load(offsets + latent)
    high = tl.load(offsets + latent + 1)
    tiles_from = tl.minimum((low + TILE - 1) // TILE * TILE, high)
    tiles_to = tl.maximum(high // TILE * TILE, tiles_from)
    row_sum, partial = _sum_pairs(order, tokens, weights, rows, low, tiles_from, cols, d, BP, BD)
    weight_sum = tl.sum(partial, axis=0)
    for tile in range(tiles_from // TILE, tiles_to // TILE):
        row_sum += tl.load(tile_rows + tile * d + cols, mask=cols < d, other=0.0)
        weight_sum += tl.load(tile_weights + tile)
    tail, partial = _sum_pairs(order, tokens, weights, rows, tiles_to, high, cols, d, BP, BD)
    return row_sum + tail, weight_sum + tl.sum(partial, axis=0)


@triton.jit
def _segment_sums_kernel(
    order,  # (p,) int64
    tokens,  # (p,) int64
    offsets,  # (d_sae + 1,) int64
    weights,  # (p,), unsorted
    rows,  # (n, d)
    tile_rows,  # (n_tiles, d) fp32
    tile_weights,  # (n_tiles,) fp32
    row_sums,  # (d_sae, d), out
    weight_sums,  # (d_sae,), out
    d,
    TILE: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum one latent's pairs at BD columns."""
    latent = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    row_sum, weight_sum = sum_segment(
        latent, order, tokens, offsets, weights, rows, tile_rows, tile_weights, cols, d,
        TILE, BP, BD,
    )  # fmt: skip
    tl.store(row_sums + latent * d + cols, row_sum, mask=cols < d)
    if tl.program_id(1) == 0:
        tl.store(weight_sums + latent, weight_sum)


# Rows read at once by a program: a latent has 4 to 11 pairs at the reference shapes.
PAIRS = 4


def launch_tile_sums(segments: Segments, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of the tiles that lie inside one segment: (n_tiles, d) and (n_tiles,).

    Float32; tiles that lie in several segments stay unwritten. `weights` has one element a pair,
    unsorted; `rows` is (n, d), contiguous.
    """
    d_sae, d = segments.offsets.numel() - 1, rows.shape[1]
    # Only whole tiles can lie inside a segment; the last, shorter one is summed pair by pair.
    n_tiles = segments.order.numel() // TILE
    tile_rows = rows.new_empty((n_tiles, d), dtype=torch.float32)
    tile_weights = rows.new_empty((n_tiles,), dtype=torch.float32)
    width = block_width(d, rows.dtype)
    launch(
        _tile_sums_kernel,
        (n_tiles, cdiv(d, width)),
        *(segments.order, segments.tokens, segments.latents, weights, rows),
        *(tile_rows, tile_weights, d_sae, d),
        num_warps=warps_for(width, rows.dtype),
        TILE=TILE,
        BP=PAIRS,
        BD=width,
    )
    return tile_rows, tile_weights


def launch_segment_sums(
    segments: Segments, weights: Tensor, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return row_sums (d_sae, d) and weight_sums (d_sae,) of `dtype`; sums are kept in float32.

    `weights` has one element a pair, unsorted; `rows` is (n, d), contiguous.
    """
    d_sae, d = segments.offsets.numel() - 1, rows.shape[1]
    row_sums = rows.new_empty((d_sae, d), dtype=dtype)
    weight_sums = rows.new_empty((d_sae,), dtype=dtype)
    weights = weights.reshape(-1)
    tile_sums = launch_tile_sums(segments, weights, rows)
    width = block_width(d, rows.dtype)
    launch(
        _segment_sums_kernel,
        (d_sae, cdiv(d, width)),
        *(segments.order, segments.tokens, segments.offsets, weights, rows),
        *(*tile_sums, row_sums, weight_sums, d),
        num_warps=warps_for(width, rows.dtype),
        TILE=TILE,
        BP=PAIRS,
        BD=width,
    )
    return row_sums, weight_sums


def block_width(d: int, dtype: torch.dtype) -> int:
    """Return the columns a program takes of rows of d: few masked lanes, then as many as fit.

    At most 128 threads with 16 bytes each: 1024 columns of 16 bits, 512 of 32.
    """
    widest = 2048 // dtype.itemsize
    choices = [widest >> shift for shift in range(4)]
    return min(choices, key=lambda width: (cdiv(d, width) * width, -width))


def warps_for(width: int, dtype: torch.dtype) -> int:
    """Return the warps with which each thread loads 16 bytes of a row of `width` columns."""
    return max(1, width * dtype.itemsize // 512)


def of_latents(segments: Segments, start: int, stop: int) -> tuple[Segments, slice]:
    """Return the segments of the latents in [start, stop) as if there were no others, and which of
    the sorted pairs they are.

    All of them are returned as they are; some need their bounds on the host.
    """
    if (start, stop) == (0, segments.offsets.numel() - 1):
        return segments, slice(None)
    offsets = segments.offsets[start : stop + 1]
    first = int(offsets[0])
    pairs = slice(first, int(offsets[-1]))
    order, tokens, latents = segments.order, segments.tokens, segments.latents
    return Segments(order[pairs], tokens[pairs], latents[pairs], offsets - first, False), pairs


def weighted_row_sums(segments: Segments, weights: Tensor, rows: Tensor) -> Tensor:
    """Return (d_sae, d): for each latent, Σ weights[pair] · rows[token of pair].

    `weights` has one element a pair, unsorted, and `rows` (n, d) shares its dtype. Latents without
    pairs get zero rows.
    """
    return sorted_row_sums(segments, weights.reshape(-1)[segments.order], rows)


def sorted_row_sums(segments: Segments, weights: Tensor, rows: Tensor) -> Tensor:
    """As `weighted_row_sums`, of weights that are sorted by latent already."""
    if not (segments.order.numel() and rows.shape[0]):
        return rows.new_zeros(segments.offsets.numel() - 1, rows.shape[1])
    # A bag behind the last latent's takes a ragged code's padding.
    sums = F.embedding_bag(
        segments.tokens.clamp(max=rows.shape[0] - 1) if segments.may_pad else segments.tokens,
        rows,
        segments.offsets,
        per_sample_weights=weights,
        mode="sum",
        include_last_offset=not segments.may_pad,
    )
    return sums[: segments.offsets.numel() - 1]


def weighted_sums(segments: Segments, weights: Tensor) -> Tensor:
    """Return (d_sae,): for each latent, the sum of the `weights` of its pairs."""
    return sorted_sums(segments, weights.reshape(-1)[segments.order])


def sorted_sums(segments: Segments, weights: Tensor) -> Tensor:
    """As `weighted_sums`, of weights that are sorted by latent already."""
    if not segments.order.numel():
        return weights.new_zeros(segments.offsets.numel() - 1)
    return torch.segment_reduce(weights, "sum", offsets=segments.offsets, unsafe=True)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype to compute in so that sums are kept in at least float32.

    On a GPU embedding_bag reads 16-bit rows and sums in float32, so 16-bit stays; the CPU's sums
    in the rows' own dtype, so 16-bit is widened first.
    """
    dtype = result_dtype(*tensors)
    is_narrow = dtype in (torch.float16, torch.bfloat16)
    on_cpu = any(tensor is not None and tensor.is_cpu for tensor in tensors)
    return torch.float32 if is_narrow and on_cpu else dtype


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype that PyTorch's arithmetic between the tensors' elements would have."""
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype
