"""The gradient of a linear encoder whose pre-activations matter at k latents a token only.

Maths: with P(l) the pairs (i, j) that have indices[i, j] = l,
grad_W_enc[l] = Σ over P(l) of grad_values[i, j] · x[i] and grad_b_enc[l] = Σ over P(l) of
grad_values[i, j].
Shapes: grad_values, indices (..., k); x (..., d_in) → (d_sae, d_in), (d_sae).
Dtypes: as in decode.py. Bytes: n·k·d_in·itemsize, a gather of x; never (n, d_sae) or (n·k, d_in).
Deterministic: yes, bitwise (see segments.py).
"""

import torch
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
from .segments import by_latent, compute_dtype, result_dtype, weighted_row_sums, weighted_sums


def sparse_encoder_grad_reference(
    grad_values: Tensor, indices: Tensor, x: Tensor, d_sae: int
) -> tuple[Tensor, Tensor]:
    """Return grad_W_enc and grad_b_enc through a dense (n, d_sae) matrix: the specification."""
    k = indices.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    dense = grad_values.new_zeros(rows.shape[0], d_sae)
    dense = dense.scatter_add(1, indices.reshape(-1, k), grad_values.reshape(-1, k))
    dtype = result_dtype(grad_values, x)
    return dense.T.to(dtype) @ rows.to(dtype), dense.sum(0).to(dtype)


@torch.library.custom_op("sae_kernels::sparse_encoder_grad", mutates_args=())
def encoder_grad_rows(
    grad_values: Tensor, indices: Tensor, x: Tensor, d_sae: int
) -> tuple[Tensor, Tensor]:
    """Return grad_W_enc, grad_b_enc of grad_values, indices (n, k) and x (n, d_in)."""
    dtype, out = compute_dtype(grad_values, x), result_dtype(grad_values, x)
    segments = by_latent(indices, d_sae)
    weights = grad_values.to(dtype)
    grad_weight = weighted_row_sums(segments, weights, x.to(dtype).contiguous())
    return grad_weight.to(out), weighted_sums(segments, weights).to(out)


@encoder_grad_rows.register_fake
def _(
    grad_values: Tensor,
    indices: Tensor,  # noqa: ARG001 - the op's schema
    x: Tensor,
    d_sae: int,
) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(grad_values, x)
    return x.new_empty((d_sae, x.shape[1]), dtype=dtype), x.new_empty((d_sae,), dtype=dtype)


def sparse_encoder_grad(
    grad_values: Tensor,
    indices: Tensor,
    x: Tensor,
    d_sae: int,
    *,
    impl: Impl = "auto",
    check_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (grad_W_enc (d_sae, d_in), grad_b_enc (d_sae)) of the pairs' gradients.

    grad_values (..., k) floating is dL/dpre_acts at `indices` (..., k) int64; x (..., d_in) is
    what the encoder multiplied (after its bias was subtracted). Latents without pairs get zeros.
    The results have the promoted dtype of grad_values and x. It is a gradient itself: only the
    reference can be differentiated again.

    `check_indices` reads the data to check the range of `indices` (see `set_debug`).
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    check_floating(grad_values=grad_values, x=x)
    check_same_device(grad_values=grad_values, indices=indices, x=x)
    check_pairs("grad_values", grad_values, indices)
    leading = {f"axis {i}": size for i, size in enumerate(indices.shape[:-1])}
    check_shape("x", x, {**leading, "d_in": None})
    if d_sae < 1:
        raise ValueError(f"`d_sae` must be at least 1; got {d_sae}. Pass the dictionary's width.")
    check_index_range(indices, d_sae, check_indices)
    if use_reference(impl, "sparse_encoder_grad"):
        return sparse_encoder_grad_reference(grad_values, indices, x, d_sae)
    n, k = indices.shape[:-1].numel(), indices.shape[-1]
    pairs = grad_values.reshape(n, k), indices.reshape(n, k)
    return encoder_grad_rows(*pairs, x.reshape(n, x.shape[-1]), d_sae)
