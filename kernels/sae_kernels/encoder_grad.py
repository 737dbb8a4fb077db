"""The gradient of a linear encoder whose pre-activations matter at k latents a token only.

Maths: with P(l) the pairs (i, j) that have indices[i, j] = l,
grad_W_enc[l] = Σ over P(l) of grad_values[i, j] · x[i] and grad_b_enc[l] = Σ over P(l) of
grad_values[i, j].
Shapes: grad_values, indices (..., k); x (..., d_in), or ragged as in decode.py → (d_sae, d_in),
(d_sae).
Dtypes: as in decode.py. Bytes: n·k·d_in·itemsize, a gather of x; never (n, d_sae) or (n·k, d_in).
Deterministic: yes, bitwise (see segments.py).
"""

import torch
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
    leading_axes,
)
from .ragged import tokens_of_code
from .segments import (
    by_latent,
    compute_dtype,
    launch_segment_sums,
    result_dtype,
    weighted_row_sums,
    weighted_sums,
)


def sparse_encoder_grad_reference(
    grad_values: Tensor,
    indices: Tensor,
    x: Tensor,
    d_sae: int,
    *,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return grad_W_enc and grad_b_enc through a dense (n, d_sae) matrix: the specification."""
    rows = x.reshape(-1, x.shape[-1])
    n, tokens = rows.shape[0], tokens_of_code(indices, offsets).reshape(-1)
    # Row n takes a ragged code's padding.
    dense = grad_values.new_zeros(n + 1, d_sae).index_put(
        (tokens, indices.reshape(-1)), grad_values.reshape(-1), accumulate=True
    )[:n]
    dtype = result_dtype(grad_values, x)
    return dense.T.to(dtype) @ rows.to(dtype), dense.sum(0).to(dtype)


@torch.library.custom_op("sae_kernels::sparse_encoder_grad", mutates_args=())
def encoder_grad_rows(
    grad_values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    d_sae: int,
    dtype: torch.dtype,
    with_triton: bool,
) -> tuple[Tensor, Tensor]:
    """Return grad_W_enc, grad_b_enc of `dtype` from the pairs' gradients and x (n, d_in)."""
    segments = by_latent(indices, d_sae, offsets)
    weights, x = grad_values.contiguous(), x.contiguous()
    if with_triton:
        return launch_segment_sums(segments, weights, x, dtype)
    wide = compute_dtype(weights, x)
    grad_weight = weighted_row_sums(segments, weights.to(wide), x.to(wide))
    return grad_weight.to(dtype), weighted_sums(segments, weights.to(wide)).to(dtype)


@encoder_grad_rows.register_fake
def _(
    grad_values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    d_sae: int,
    dtype: torch.dtype,
    with_triton: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((d_sae, x.shape[1]), dtype=dtype), x.new_empty((d_sae,), dtype=dtype)


def sparse_encoder_grad(
    grad_values: Tensor,
    indices: Tensor,
    x: Tensor,
    d_sae: int,
    *,
    offsets: Tensor | None = None,
    impl: Impl = "auto",
    check_indices: bool = False,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (grad_W_enc (d_sae, d_in), grad_b_enc (d_sae)) of the pairs' gradients.

    grad_values (..., k) floating is dL/dpre_acts at `indices` (..., k) int64; x (..., d_in) is
    what the encoder multiplied (after its bias was subtracted). With `offsets` (n + 1,) the code is
    ragged: grad_values and indices are (p,) and x is (n, d_in), as in `sparse_decode`. Latents
    without pairs get zeros. The results have the promoted dtype of grad_values and x. It is a
    gradient itself: only the reference can be differentiated again.

    `check_indices` reads the data to check the range of `indices` (see `set_debug`; unchecked, an
    index out of range is undefined on a GPU), `check_finite` to check the floats.
    Raises ValueError or TypeError for shapes, dtypes, devices or data that do not fit.
    """
    check_floating(grad_values=grad_values, x=x)
    check_same_device(grad_values=grad_values, indices=indices, offsets=offsets, x=x)
    check_code("grad_values", grad_values, indices, offsets)
    leading = leading_axes(indices, offsets)
    check_shape("x", x, {**leading, "d_in": None})
    if d_sae < 1:
        raise ValueError(f"`d_sae` must be at least 1; got {d_sae}. Pass the dictionary's width.")
    check_index_range(indices, d_sae, check_indices)
    check_finite_values(check_finite, grad_values=grad_values, x=x)
    form = choose_form(impl, "sparse_encoder_grad", grad_values, x)
    if form == "reference":
        return sparse_encoder_grad_reference(grad_values, indices, x, d_sae, offsets=offsets)
    if offsets is None:
        n, k = indices.shape[:-1].numel(), indices.shape[-1]
        grad_values, indices = grad_values.reshape(n, k), indices.reshape(n, k)
        x = x.reshape(n, x.shape[-1])
    dtype = result_dtype(grad_values, x)
    return encoder_grad_rows(grad_values, indices, offsets, x, d_sae, dtype, form == "triton")
