"""Encode and keep the k largest: one dense matmul forward, none backward.

Maths: pre_acts = (x − b_dec) @ W_encᵀ + b_enc; values, indices = top-k of each row;
values = relu(values). The gradient of a top-k is zero outside the k winners, so with g the
gradient of the kept pre-activations: dL/dW_enc and dL/db_enc are sums over pairs
(encoder_grad.py), dL/db_dec = −dL/db_enc @ W_enc, dL/dx = Σ_j g[i, j] · W_enc[indices[i, j]].
Shapes: x (..., d_in), W_enc (d_sae, d_in), b_enc (d_sae), b_dec (d_in) → (..., k) twice.
Dtypes: computed in the promoted dtype of the inputs, or in autocast's.
Bytes: the matmul's 2·n·d_sae·d_in FLOPs dominate; pre-activations live in one bounded buffer that
chunks of tokens reuse. Deterministic: as far as the matmul is; backward bitwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    Impl,
    check_at_least_1d,
    check_finite_values,
    check_floating,
    check_k,
    check_same_device,
    check_shape,
    choose_form,
)
from .decode import decode_rows
from .encoder_grad import encoder_grad_rows
from .row_topk import topk_reference, topk_rows
from .segments import result_dtype

CPU_BUFFER_BYTES = 64 * 2**20
GPU_BUFFER_BYTES = 2 * 2**30


def encode_topk_reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None = None,
    *,
    k: int,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return values, indices through dense pre-activations: the specification."""
    centred = x if b_dec is None else x - b_dec
    given = (centred, W_enc, b_enc)
    dtype = result_dtype(*given)
    pre_acts = F.linear(*(tensor.to(dtype) for tensor in given))
    values, indices = topk_reference(pre_acts, k)
    values = values.relu() if relu else values
    return (values.float() if _autocast_dtype(x) else values), indices


@torch.library.custom_op("sae_kernels::encode_topk", mutates_args=())
def encode_rows(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    k: int,
    relu: bool,
    chunk_tokens: int,
    dtype: torch.dtype,
    with_triton: bool,
) -> tuple[Tensor, Tensor]:
    """Return values (n, k) of `dtype` and indices (n, k), `chunk_tokens` tokens at a time."""
    n = x.shape[0]
    values, indices = x.new_empty((n, k), dtype=dtype), x.new_empty((n, k), dtype=torch.int64)
    weight, bias = W_enc.to(dtype).T, b_enc.to(dtype)
    buffer = x.new_empty((min(chunk_tokens, n), W_enc.shape[0]), dtype=dtype)
    # The matmul's dtype is `dtype`, whatever autocast would make of it.
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, n, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, n))
            rows = x[chunk] if b_dec is None else x[chunk] - b_dec
            pre_acts = buffer[: rows.shape[0]]
            torch.addmm(bias, rows.to(dtype), weight, out=pre_acts)
            values[chunk], indices[chunk] = topk_rows(pre_acts, k, with_triton)
    return (values.relu_() if relu else values), indices


@encode_rows.register_fake
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    k: int,
    relu: bool,
    chunk_tokens: int,
    dtype: torch.dtype,
    with_triton: bool,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int64)


class _EncodeTopK(torch.autograd.Function):
    """Values with gradients to x, W_enc, b_enc and b_dec; indices are not differentiable."""

    @staticmethod
    def forward(
        ctx, x, W_enc, b_enc, b_dec, k, relu, chunk_tokens, dtype, values_dtype, with_triton
    ):
        values, indices = encode_rows(
            x, W_enc, b_enc, b_dec, k, relu, chunk_tokens, dtype, with_triton
        )
        values = values.to(values_dtype)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, W_enc, b_dec, indices, values if relu else None)
        ctx.bias_dtype, ctx.with_triton = b_enc.dtype, with_triton
        return values, indices

    @staticmethod
    def backward(ctx, *grads):
        x, W_enc, b_dec, indices, fired = ctx.saved_tensors
        grad = grads[0] if fired is None else grads[0].masked_fill(fired <= 0, 0)
        needs_x, needs_weight, needs_b_enc, needs_b_dec = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_b_enc = grad_b_dec = None
        if needs_x:
            grad_x = decode_rows(grad, indices, None, W_enc, None, ctx.with_triton).to(x.dtype)
        if needs_weight or needs_b_enc or needs_b_dec:
            centred = x if b_dec is None else x - b_dec
            shape = W_enc.shape[0], torch.promote_types(W_enc.dtype, ctx.bias_dtype)
            sums, bias_sums = encoder_grad_rows(
                grad, indices, None, centred, *shape, ctx.with_triton
            )
            grad_weight = sums.to(W_enc.dtype) if needs_weight else None
            grad_b_enc = bias_sums.to(ctx.bias_dtype) if needs_b_enc else None
            if needs_b_dec and b_dec is not None:
                grad_b_dec = _b_dec_grad(bias_sums, W_enc).to(b_dec.dtype)
        return grad_x, grad_weight, grad_b_enc, grad_b_dec, *[None] * 6


def _b_dec_grad(bias_sums: Tensor, W_enc: Tensor) -> Tensor:
    """Return −bias_sums @ W_enc: one (d_sae) vector instead of a sum over dL/dx of all tokens."""
    with torch.autocast(W_enc.device.type, enabled=False):
        return -(bias_sums.to(W_enc.dtype) @ W_enc)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype autocast asks for on x's device, or None when it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _chunk_tokens(n: int, d_sae: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the tokens a chunk may hold, the chunks of n tokens being about equal."""
    bound = CPU_BUFFER_BYTES if device.type == "cpu" else GPU_BUFFER_BYTES
    most = max(1, bound // (d_sae * dtype.itemsize))
    n_chunks = max(1, -(-n // most))
    return max(1, -(-n // n_chunks))


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None = None,
    *,
    k: int,
    relu: bool = True,
    chunk_tokens: int | None = None,
    impl: Impl = "auto",
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the k largest of (x − b_dec) @ W_encᵀ + b_enc: values and int64 indices (..., k).

    x (..., d_in), W_enc (d_sae, d_in), b_enc (d_sae), b_dec (d_in) or None. With `relu` values
    below zero come back as zero and get no gradient. The order within a row is unspecified, ties
    are broken arbitrarily, and indices carry no gradient. At most `chunk_tokens` tokens'
    pre-activations exist at a time; None derives it from a buffer of 64 MiB on CPU and 2 GiB on
    GPU (the reference ignores it and keeps all).

    Under autocast the matmul runs in autocast's dtype and values come back in float32; gradients
    have the dtype of the parameters and are summed in at least float32. First derivatives only.

    `check_finite` reads the data to check the floats.
    Raises ValueError or TypeError for shapes, dtypes, devices, data or a k that do not fit.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3.
    Deviation: the ReLU after TopK is optional.
    """
    check_floating(x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    check_same_device(x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    check_at_least_1d(x=x)
    check_shape("W_enc", W_enc, {"d_sae": None, "d_in": x.shape[-1]})
    check_shape("b_enc", b_enc, {"d_sae": W_enc.shape[0]})
    check_shape("b_dec", b_dec, {"d_in": x.shape[-1]})
    d_sae = W_enc.shape[0]
    check_k(k, d_sae, "d_sae")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"`chunk_tokens` must be at least 1; got {chunk_tokens}. Leave it None to derive it."
        )
    check_finite_values(check_finite, x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    form = choose_form(impl, "encode_topk", x, W_enc, b_enc, b_dec)
    if form == "reference":
        return encode_topk_reference(x, W_enc, b_enc, b_dec, k=k, relu=relu)
    given = (x, W_enc, b_enc) if b_dec is None else (x, W_enc, b_enc, b_dec)
    autocast_dtype = _autocast_dtype(x)
    dtype = autocast_dtype or result_dtype(*given)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    chunk = chunk_tokens or _chunk_tokens(rows.shape[0], d_sae, dtype, x.device)
    values_dtype = torch.float32 if autocast_dtype else dtype
    values, indices = _EncodeTopK.apply(
        rows, W_enc, b_enc, b_dec, k, relu, chunk, dtype, values_dtype, form == "triton"
    )
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)
