"""Decode a sparse code: a weighted sum of k decoder rows a token.

Maths: x_hat[i] = Σ_j values[i, j] · W_dec[indices[i, j]] + b_dec. With g = dL/dx_hat and P(l) the
pairs (i, j) that have indices[i, j] = l: dL/dvalues[i, j] = ⟨g[i], W_dec[indices[i, j]]⟩,
dL/dW_dec[l] = Σ over P(l) of values[i, j] · g[i], dL/db_dec = Σ_i g[i].
Shapes: values, indices (..., k); W_dec (d_sae, d_out); b_dec (d_out) → x_hat (..., d_out).
Dtypes: float16, bfloat16, float32, float64, mixed as PyTorch promotes; sums in at least float32.
Bytes: n·k·d_out·itemsize a gather, one forward and two backward; never (n, d_sae) or (n·k, d).
Deterministic: yes, bitwise, forward and backward (see segments.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    Impl,
    check_floating,
    check_index_range,
    check_pairs,
    check_same_device,
    check_shape,
    use_reference,
)
from .segments import by_latent, compute_dtype, result_dtype, weighted_row_sums


def sparse_decode_reference(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None
) -> Tensor:
    """Return x_hat (..., d_out) through a (..., k, d_out) gather: the specification."""
    x_hat = (values.unsqueeze(-1) * W_dec[indices]).sum(-2)
    return x_hat if b_dec is None else x_hat + b_dec


@torch.library.custom_op("sae_kernels::sparse_decode", mutates_args=())
def decode_rows(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """Return x_hat (n, d_out) of values, indices (n, k)."""
    given = (values, W_dec) if b_dec is None else (values, W_dec, b_dec)
    dtype = compute_dtype(*given)
    if not indices.shape[0]:
        return W_dec.new_empty((0, W_dec.shape[1]), dtype=result_dtype(*given))
    x_hat = F.embedding_bag(
        indices.contiguous(),
        W_dec.to(dtype).contiguous(),
        per_sample_weights=values.to(dtype).contiguous(),
        mode="sum",
    )
    if b_dec is not None:
        x_hat += b_dec
    return x_hat.to(result_dtype(*given))


@decode_rows.register_fake
def _(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    given = (values, W_dec) if b_dec is None else (values, W_dec, b_dec)
    return W_dec.new_empty((indices.shape[0], W_dec.shape[1]), dtype=result_dtype(*given))


@torch.library.custom_op("sae_kernels::sparse_decode_values_grad", mutates_args=())
def values_grad(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Return ⟨grad[i], W_dec[indices[i, j]]⟩ as (n, k), of grad (n, d_out) and indices (n, k).

    torch's own backward of embedding_bag does the dot products pair by pair with no temporary; a
    chunked gather and bmm took nine times as long on CPU.
    """
    dtype = compute_dtype(grad, W_dec)
    n, k = indices.shape
    if not n:
        return grad.new_empty((0, k), dtype=dtype)
    pairs = torch.arange(n * k, device=indices.device)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.to(dtype).contiguous(),
        W_dec.to(dtype).contiguous(),
        indices.reshape(-1).contiguous(),
        pairs[::k].contiguous(),  # where each token's bag begins
        pairs // k,  # the token of each pair
        0,  # mode "sum"
    )
    return dots.reshape(n, k)


@values_grad.register_fake
def _(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return grad.new_empty(indices.shape, dtype=compute_dtype(grad, W_dec))


@torch.library.custom_op("sae_kernels::sparse_decode_weight_grad", mutates_args=())
def weight_grad(values: Tensor, indices: Tensor, grad: Tensor, d_sae: int) -> Tensor:
    """Return dL/dW_dec (d_sae, d_out) of values, indices (n, k) and grad (n, d_out)."""
    dtype = compute_dtype(values, grad)
    segments = by_latent(indices, d_sae)
    return weighted_row_sums(segments, values.to(dtype), grad.to(dtype).contiguous())


@weight_grad.register_fake
def _(values: Tensor, indices: Tensor, grad: Tensor, d_sae: int) -> Tensor:  # noqa: ARG001 - the op's schema
    return grad.new_empty((d_sae, grad.shape[1]), dtype=compute_dtype(values, grad))


class _SparseDecode(torch.autograd.Function):
    """x_hat with gradients to values, W_dec and b_dec, each only when it is asked for."""

    @staticmethod
    def forward(ctx, values, indices, W_dec, b_dec):
        ctx.save_for_backward(values, indices, W_dec)
        ctx.bias_dtype = None if b_dec is None else b_dec.dtype
        return decode_rows(values, indices, W_dec, b_dec)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        values, indices, W_dec = ctx.saved_tensors
        needs_values, _, needs_weight, needs_bias = ctx.needs_input_grad
        grad_values = grad_weight = grad_bias = None
        if needs_values:
            grad_values = values_grad(grad, indices, W_dec).to(values.dtype)
        if needs_weight:
            grad_weight = weight_grad(values, indices, grad, W_dec.shape[0]).to(W_dec.dtype)
        if needs_bias:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_values, None, grad_weight, grad_bias


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    impl: Impl = "auto",
    check_indices: bool = False,
) -> Tensor:
    """Return x_hat (..., d_out) = Σ_j values[..., j] · W_dec[indices[..., j]] + b_dec.

    values (..., k) floating, indices (..., k) int64 in [0, d_sae), W_dec (d_sae, d_out), b_dec
    (d_out) or None. The result has the promoted dtype of the floating inputs; autocast changes
    nothing here. An index that occurs twice in a row counts twice. First derivatives only.

    `check_indices` reads the data to check the range of `indices` (see `set_debug`).
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix D (sparse
    kernels); ours sums each latent's pairs in a fixed order instead of with atomics.
    """
    check_floating(values=values, W_dec=W_dec, b_dec=b_dec)
    check_same_device(values=values, indices=indices, W_dec=W_dec, b_dec=b_dec)
    check_pairs("values", values, indices)
    check_shape("W_dec", W_dec, {"d_sae": None, "d_out": None})
    check_shape("b_dec", b_dec, {"d_out": W_dec.shape[1]})
    check_index_range(indices, W_dec.shape[0], check_indices)
    if use_reference(impl, "sparse_decode"):
        return sparse_decode_reference(values, indices, W_dec, b_dec)
    n, k = indices.shape[:-1].numel(), indices.shape[-1]
    x_hat = _SparseDecode.apply(values.reshape(n, k), indices.reshape(n, k), W_dec, b_dec)
    return x_hat.reshape(*indices.shape[:-1], W_dec.shape[1])
