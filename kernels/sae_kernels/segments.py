"""The (token, latent) pairs of a sparse code, regrouped by latent: one sort, two gradients.

A code of n tokens holds p = n·k pairs in token order (CSR). A gradient of a weight row needs the
pairs of one latent together (CSC). A stable sort by latent id keeps tokens ascending inside a
segment, so each row is summed in one fixed order by one thread: no atomics, and bitwise the same
result on every run and for any number of threads.

Cost: the sort is 1 to 3 ms for 131072 pairs on one CPU core, about 1% of a training step. That is
why the decoder's and the encoder's gradient each sort for themselves and no cache is shared.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_RADIX_BITS = 16


class Segments(NamedTuple):
    """Pairs sorted by latent: those of latent j are `order[offsets[j]:offsets[j + 1]]`."""

    order: Tensor  # (p,) int64, positions in the flattened (n, k) code
    tokens: Tensor  # (p,) int64, the token of each sorted pair
    offsets: Tensor  # (d_sae + 1,) int64


def by_latent(indices: Tensor, d_sae: int) -> Segments:
    """Sort the pairs of `indices` (n, k) int64 stably by latent id, without a host sync on GPU."""
    flat = indices.reshape(-1)
    order = _radix_argsort(flat, d_sae) if flat.is_cpu else torch.sort(flat, stable=True)[1]
    latents = torch.arange(d_sae + 1, device=flat.device)
    offsets = torch.searchsorted(flat[order], latents)
    return Segments(order, order // indices.shape[-1], offsets)


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


def weighted_row_sums(segments: Segments, weights: Tensor, rows: Tensor) -> Tensor:
    """Return (d_sae, d): for each latent, Σ weights[pair] · rows[token of pair].

    `weights` (n, k) and `rows` (n, d) share a dtype. Latents without pairs get zero rows.
    """
    d_sae = segments.offsets.numel() - 1
    if not segments.order.numel():
        return rows.new_zeros(d_sae, rows.shape[1])
    return F.embedding_bag(
        segments.tokens,
        rows,
        segments.offsets,
        per_sample_weights=weights.reshape(-1)[segments.order],
        mode="sum",
        include_last_offset=True,
    )


def weighted_sums(segments: Segments, weights: Tensor) -> Tensor:
    """Return (d_sae,): for each latent, the sum of the `weights` (n, k) of its pairs."""
    if not segments.order.numel():
        return weights.new_zeros(segments.offsets.numel() - 1)
    sorted_weights = weights.reshape(-1)[segments.order]
    return torch.segment_reduce(sorted_weights, "sum", offsets=segments.offsets, unsafe=True)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in so that sums are kept in at least float32.

    On a GPU embedding_bag reads 16-bit rows and sums in float32, so 16-bit stays; the CPU's sums
    in the rows' own dtype, so 16-bit is widened first.
    """
    dtype = result_dtype(*tensors)
    is_narrow = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if is_narrow and tensors[0].device.type == "cpu" else dtype


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that PyTorch's arithmetic between the tensors' elements would have."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
