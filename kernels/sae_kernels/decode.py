"""Decode a sparse code: a weighted sum of decoder rows a token.

Maths: x_hat[i] = Σ over the pairs (a, l) of token i of a · W_dec[l] + b_dec. With g = dL/dx_hat:
dL/da = ⟨g[i], W_dec[l]⟩, dL/dW_dec[l] = Σ over the pairs (i, a) of latent l of a · g[i],
dL/db_dec = Σ_i g[i].
Shapes: values, indices (..., k), or (p,) with offsets (n + 1,); W_dec (d_sae, d_out); b_dec (d_out)
→ x_hat (..., d_out), or (n, d_out).
Dtypes: float16, bfloat16, float32, float64, mixed as PyTorch promotes; sums in at least float32.
Bytes: n·k·d_out·itemsize a gather, one forward and two backward; never (n, d_sae) or (n·k, d).
Deterministic: yes, bitwise, forward and backward (see segments.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    Impl,
    check_code,
    check_finite_values,
    check_floating,
    check_index_range,
    check_same_device,
    check_shape,
    choose_form,
)
from .launching import cdiv, launch, tl, triton
from .ragged import tokens_of_pairs
from .segments import (
    block_width,
    by_latent,
    compute_dtype,
    launch_segment_sums,
    result_dtype,
    warps_for,
    weighted_row_sums,
)


def sparse_decode_reference(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
) -> Tensor:
    """Return x_hat through one gathered row a pair: the specification."""
    terms = values.unsqueeze(-1) * W_dec[indices]
    if offsets is None:
        x_hat = terms.sum(-2)
    else:
        n = offsets.numel() - 1
        tokens = tokens_of_pairs(offsets, indices.numel())
        x_hat = terms.new_zeros(n + 1, W_dec.shape[1]).index_add(0, tokens, terms)[:n]
    return x_hat if b_dec is None else x_hat + b_dec


@triton.jit
def pairs_of_token(token, offsets, k):
    """Return the half-open range of a token's pairs: k each, or as `offsets` say."""
    if offsets is None:
        low = token * k
        high = low + k
    else:
        low = tl.load(offsets + token)
        high = tl.load(offsets + token + 1)
    return low, high


@triton.jit
def load_weight_rows(weight, latents, real, cols, d):
    """Return the (pairs, columns) block of float32 weights, zero where a pair is not `real`."""
    mask = real[:, None] & (cols < d)[None, :]
    at = latents[:, None].to(tl.int64) * d + cols[None, :]
    return tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _decode_kernel(
    values,  # (p,)
    indices,  # (p,) int64
    offsets,  # (n + 1,) int64 or None
    weight,  # (d_sae, d)
    bias,  # (d,) or None
    out,  # (n, d)
    k,
    d,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Decode one token at BD columns, BP pairs at a time."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    low, high = pairs_of_token(token, offsets, k)
    x_hat = tl.zeros((BD,), tl.float32)
    for start in range(low, high, BP):
        pairs = start + tl.arange(0, BP)
        real = pairs < high
        value = tl.load(values + pairs, mask=real, other=0.0).to(tl.float32)
        latents = tl.load(indices + pairs, mask=real, other=0)
        x_hat += tl.sum(value[:, None] * load_weight_rows(weight, latents, real, cols, d), axis=0)
    if bias is not None:
        x_hat += tl.load(bias + cols, mask=cols < d, other=0.0).to(tl.float32)
    tl.store(out + token * d + cols, x_hat, mask=cols < d)


@triton.jit
def _values_grad_kernel(
    grad,  # (n, d)
    indices,  # (p,) int64
    offsets,  # (n + 1,) int64 or None
    weight,  # (d_sae, d)
    out,  # (p,)
    k,
    d,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Take the dot products of one token's gradient with its rows, every n-th block of BP pairs."""
    token = tl.program_id(0).to(tl.int64)
    low, high = pairs_of_token(token, offsets, k)
    for start in range(low + tl.program_id(1) * BP, high, tl.num_programs(1) * BP):
        pairs = start + tl.arange(0, BP)
        real = pairs < high
        latents = tl.load(indices + pairs, mask=real, other=0)
        products = tl.zeros((BP, BD), tl.float32)
        for first in range(0, d, BD):
            cols = first + tl.arange(0, BD)
            g = tl.load(grad + token * d + cols, mask=cols < d, other=0.0).to(tl.float32)
            products += load_weight_rows(weight, latents, real, cols, d) * g[None, :]
        tl.store(out + pairs, tl.sum(products, axis=1), mask=real)


# Pairs a block: with 16 bytes a thread, 8 rows of 1024 columns are 128 loads in flight a warp.
PAIRS = 8
# A token of a ragged code may have any number of pairs; this many programs share its blocks.
RAGGED_SLICES = 4


def launch_decode(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x_hat (n, d_out) of `dtype`, or of the promoted one."""
    n, k = tokens_and_k(indices, offsets)
    d = W_dec.shape[1]
    x_hat = W_dec.new_empty((n, d), dtype=dtype or result_dtype(values, W_dec, b_dec))
    width = block_width(d, W_dec.dtype)
    launch(
        _decode_kernel,
        (n, cdiv(d, width)),
        *(values, indices, offsets, W_dec, b_dec, x_hat, k, d),
        num_warps=warps_for(width, W_dec.dtype),
        BP=PAIRS,
        BD=width,
    )
    return x_hat


def launch_values_grad(
    grad: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor
) -> Tensor:
    """Return dL/dvalues, shaped as `indices`, in float32; zero at a ragged code's padding."""
    n, k = tokens_and_k(indices, offsets)
    d = W_dec.shape[1]
    make = grad.new_empty if offsets is None else grad.new_zeros
    dots = make(indices.shape, dtype=torch.float32)
    width = block_width(d, W_dec.dtype)
    launch(
        _values_grad_kernel,
        (n, cdiv(k, PAIRS) if offsets is None else RAGGED_SLICES),
        *(grad, indices, offsets, W_dec, dots, k, d),
        num_warps=warps_for(width, W_dec.dtype),
        BP=PAIRS,
        BD=width,
    )
    return dots


def tokens_and_k(indices: Tensor, offsets: Tensor | None) -> tuple[int, int]:
    """Return (n, k) of a code; k is 0, and without meaning, for a ragged one."""
    if offsets is None:
        return indices.shape[0], indices.shape[1]
    return offsets.numel() - 1, 0


@torch.library.custom_op("sae_kernels::sparse_decode", mutates_args=())
def decode_rows(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    with_triton: bool,
) -> Tensor:
    """Return x_hat (n, d_out) of values, indices (n, k), or (p,) with offsets (n + 1,)."""
    values, indices, W_dec = values.contiguous(), indices.contiguous(), W_dec.contiguous()
    if with_triton:
        return launch_decode(values, indices, offsets, W_dec, b_dec)
    given = values, W_dec, b_dec
    dtype, (n, _) = compute_dtype(*given), tokens_and_k(indices, offsets)
    if not indices.numel() or not n:
        x_hat = W_dec.new_zeros((n, W_dec.shape[1]), dtype=dtype)
    else:
        # Of a ragged code one bag more than tokens, which takes the padding.
        weights = values.to(dtype)
        x_hat = F.embedding_bag(
            indices, W_dec.to(dtype), offsets, per_sample_weights=weights, mode="sum"
        )[:n]
    if b_dec is not None:
        x_hat += b_dec
    return x_hat.to(result_dtype(*given))


@decode_rows.register_fake
def _(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    with_triton: bool,
) -> Tensor:
    n, _ = tokens_and_k(indices, offsets)
    return W_dec.new_empty((n, W_dec.shape[1]), dtype=result_dtype(values, W_dec, b_dec))


@torch.library.custom_op("sae_kernels::sparse_decode_values_grad", mutates_args=())
def values_grad(
    grad: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor, with_triton: bool
) -> Tensor:
    """Return ⟨grad[token], W_dec[latent]⟩ of each pair, shaped as `indices`; 0 for padding.

    torch's own backward of embedding_bag does the dot products pair by pair with no temporary; a
    chunked gather and bmm took nine times as long on CPU.
    """
    grad, indices, W_dec = grad.contiguous(), indices.contiguous(), W_dec.contiguous()
    if with_triton:
        return launch_values_grad(grad, indices, offsets, W_dec)
    dtype, (n, k) = compute_dtype(grad, W_dec), tokens_and_k(indices, offsets)
    if not indices.numel() or not n:
        return grad.new_zeros(indices.shape, dtype=dtype)
    if offsets is None:
        pairs = torch.arange(n * k, device=indices.device)
        starts, tokens = pairs[::k].contiguous(), pairs // k
    else:
        starts, tokens = offsets[:-1], tokens_of_pairs(offsets, indices.numel())
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.to(dtype),
        W_dec.to(dtype),
        indices.reshape(-1),
        starts,  # where each token's bag begins
        tokens.clamp(max=n - 1),
        0,  # mode "sum"
    )
    dots = dots.reshape(indices.shape)
    return dots if offsets is None else dots.where(tokens < n, 0)


@values_grad.register_fake
def _(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    with_triton: bool,
) -> Tensor:
    dtype = torch.float32 if with_triton else compute_dtype(grad, W_dec)
    return grad.new_empty(indices.shape, dtype=dtype)


@torch.library.custom_op("sae_kernels::sparse_decode_weight_grad", mutates_args=())
def weight_grad(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    grad: Tensor,
    d_sae: int,
    dtype: torch.dtype,
    with_triton: bool,
) -> Tensor:
    """Return dL/dW_dec (d_sae, d_out) of `dtype` from the code and grad (n, d_out)."""
    segments = by_latent(indices, d_sae, offsets)
    values, grad = values.contiguous(), grad.contiguous()
    if with_triton:
        return launch_segment_sums(segments, values, grad, dtype)[0]
    wide = compute_dtype(values, grad)
    return weighted_row_sums(segments, values.to(wide), grad.to(wide)).to(dtype)


@weight_grad.register_fake
def _(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    grad: Tensor,
    d_sae: int,
    dtype: torch.dtype,
    with_triton: bool,
) -> Tensor:
    return grad.new_empty((d_sae, grad.shape[1]), dtype=dtype)


class _SparseDecode(torch.autograd.Function):
    """x_hat with gradients to values, W_dec and b_dec, each only when it is asked for."""

    @staticmethod
    def forward(ctx, values, indices, offsets, W_dec, b_dec, with_triton):
        ctx.save_for_backward(values, indices, offsets, W_dec)
        ctx.bias_dtype = None if b_dec is None else b_dec.dtype
        ctx.with_triton = with_triton
        return decode_rows(values, indices, offsets, W_dec, b_dec, with_triton)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        values, indices, offsets, W_dec = ctx.saved_tensors
        needs_values, _, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_values = grad_weight = grad_bias = None
        if needs_values:
            grad_values = values_grad(grad, indices, offsets, W_dec, ctx.with_triton)
            grad_values = grad_values.to(values.dtype)
        if needs_weight:
            shape = W_dec.shape[0], W_dec.dtype
            grad_weight = weight_grad(values, indices, offsets, grad, *shape, ctx.with_triton)
        if needs_bias:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_values, None, None, grad_weight, grad_bias, None


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    impl: Impl = "auto",
    check_indices: bool = False,
    check_finite: bool = False,
) -> Tensor:
    """Return x_hat (..., d_out) = Σ_j values[..., j] · W_dec[indices[..., j]] + b_dec.

    values (..., k) floating, indices (..., k) int64 in [0, d_sae), W_dec (d_sae, d_out), b_dec
    (d_out) or None. A token with fewer than k latents is padded with value 0 and any valid index.
    With `offsets` (n + 1,) int64, ascending from 0, the code is ragged: values and indices are
    (p,), token i has those from offsets[i] to offsets[i + 1], and x_hat is (n, d_out).

    The result has the promoted dtype of the floating inputs; autocast changes nothing here. An
    index that occurs twice in a row counts twice. First derivatives only.

    `check_indices` reads the data to check the range of `indices` (see `set_debug`; unchecked, an
    index out of range is undefined on a GPU), `check_finite` to check the floats.
    Raises ValueError or TypeError for shapes, dtypes, devices or data that do not fit.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix D (sparse
    kernels); ours sums each latent's pairs in a fixed order instead of with atomics.
    """
    check_floating(values=values, W_dec=W_dec, b_dec=b_dec)
    check_same_device(values=values, indices=indices, offsets=offsets, W_dec=W_dec, b_dec=b_dec)
    check_code("values", values, indices, offsets)
    check_shape("W_dec", W_dec, {"d_sae": None, "d_out": None})
    check_shape("b_dec", b_dec, {"d_out": W_dec.shape[1]})
    check_index_range(indices, W_dec.shape[0], check_indices)
    check_finite_values(check_finite, values=values, W_dec=W_dec, b_dec=b_dec)
    form = choose_form(impl, "sparse_decode", values, W_dec, b_dec)
    if form == "reference":
        return sparse_decode_reference(values, indices, W_dec, b_dec, offsets=offsets)
    if offsets is not None:
        return _SparseDecode.apply(values, indices, offsets, W_dec, b_dec, form == "triton")
    n, k = indices.shape[:-1].numel(), indices.shape[-1]
    pairs = values.reshape(n, k), indices.reshape(n, k)
    x_hat = _SparseDecode.apply(*pairs, None, W_dec, b_dec, form == "triton")
    return x_hat.reshape(*indices.shape[:-1], W_dec.shape[1])
