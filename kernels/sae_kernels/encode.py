"""Encode and keep the k largest: one dense matmul forward, none backward.

Maths: pre_acts = (x − b_dec) @ W_encᵀ + b_enc; values, indices = top-k of each row;
values = relu(values). The gradient of a top-k is zero outside the k winners, so with g the
gradient of the kept pre-activations: dL/dW_enc and dL/db_enc are sums over pairs
(encoder_grad.py), dL/db_dec = −dL/db_enc @ W_enc, dL/dx = Σ_j g[i, j] · W_enc[indices[i, j]].
Shapes: x (..., d_in), W_enc (d_sae, d_in), b_enc (d_sae), b_dec (d_in) → (..., k) twice.
Dtypes: computed in the promoted dtype of the inputs, or in autocast's; with a shadow, a 16-bit copy
of W_enc that the caller keeps, in the shadow's, and no weight is cast. Rescored: a few candidates
more than k by those scores, whose dot products with W_enc's own rows decide.
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
from .decode import decode_rows, values_grad
from .encoder_grad import encoder_grad_rows
from .row_topk import topk_reference, topk_rows
from .segments import result_dtype

# A matmul of many rows is faster than several of few: 2048 rows of the CPU's wide shape fit.
CPU_BUFFER_BYTES = 256 * 2**20
GPU_BUFFER_BYTES = 2 * 2**30
SHADOW_DTYPES = (torch.bfloat16, torch.float16)


def encode_topk_reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None = None,
    *,
    k: int,
    relu: bool = True,
    shadow: Tensor | None = None,
    rescore: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Return values, indices through dense pre-activations: the specification.

    With `shadow` gradients reach W_enc through rescored values alone.
    """
    centred = x if b_dec is None else x - b_dec
    given = (centred, W_enc, b_enc)
    dtype = result_dtype(*given)
    if shadow is None:
        values, indices = topk_reference(F.linear(*(part.to(dtype) for part in given)), k)
        values = values.float() if _autocast_dtype(x) else values
    else:
        with torch.autocast(x.device.type, enabled=False):
            in_16_bits = (part.to(shadow.dtype) for part in (centred, shadow, b_enc))
            n_scored = n_candidates(k, W_enc.shape[0], _rescores(rescore, x))
            values, indices = topk_reference(F.linear(*in_16_bits), n_scored or k)
            if n_scored:
                exact = F.linear(*(part.to(dtype) for part in given)).gather(-1, indices)
                values, places = topk_reference(exact, k)
                indices = indices.gather(-1, places)
            values = values.to(torch.float32 if _autocast_dtype(x) else dtype)
    return (values.relu() if relu else values), indices


def n_candidates(k: int, d_sae: int, rescores: bool) -> int:
    """Return how many 16-bit scores are computed again from W_enc's own rows; 0 without."""
    return min(k + max(8, k // 4), d_sae) if rescores else 0


def _rescores(rescore: bool | None, x: Tensor) -> bool:
    """A gather of float32 rows costs a GPU more than the selection; a CPU, little of its matmul."""
    return x.device.type == "cpu" if rescore is None else rescore


# torch 2.11 counts the changes of what is mutated by its place: `scratch` has no default, or a call
# without one would have no such place.
@torch.library.custom_op("sae_kernels::encode_topk", mutates_args=("scratch",))
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
    scratch: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return values (n, k) of `dtype` and indices (n, k), `chunk_tokens` tokens at a time."""
    n = x.shape[0]
    values, indices = x.new_empty((n, k), dtype=dtype), x.new_empty((n, k), dtype=torch.int64)
    weight, bias = W_enc.to(dtype).T, b_enc.to(dtype)
    if scratch is None:
        scratch = x.new_empty((min(chunk_tokens, n), W_enc.shape[0]), dtype=dtype)
    # The matmul's dtype is `dtype`, whatever autocast would make of it.
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, n, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, n))
            rows = x[chunk] if b_dec is None else x[chunk] - b_dec
            pre_acts = scratch[: rows.shape[0]]
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
    scratch: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int64)


def _rescored(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    candidates: Tensor,
    k: int,
    with_triton: bool,
) -> tuple[Tensor, Tensor]:
    """Return the k largest pre-activations among `candidates` (n, c), from W_enc's rows alone."""
    rows = x if b_dec is None else x - b_dec
    scores = values_grad(rows, candidates, None, W_enc, with_triton) + b_enc[candidates]
    values, places = topk_rows(scores, k, with_triton)
    return values, candidates.gather(1, places)


class _EncodeTopK(torch.autograd.Function):
    """Values with gradients to x, W_enc, b_enc and b_dec; indices are not differentiable."""

    @staticmethod
    def forward(
        ctx, x, W_enc, b_enc, b_dec, shadow, n_scored,
        k, relu, chunk_tokens, dtype, values_dtype, with_triton, scratch,
    ):  # fmt: skip
        weight = W_enc if shadow is None else shadow
        options = chunk_tokens, dtype, with_triton, scratch
        if n_scored:
            _, indices = encode_rows(x, weight, b_enc, b_dec, n_scored, False, *options)
            values, indices = _rescored(x, W_enc, b_enc, b_dec, indices, k, with_triton)
            values = values.relu() if relu else values
        else:
            values, indices = encode_rows(x, weight, b_enc, b_dec, k, relu, *options)
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
        return grad_x, grad_weight, grad_b_enc, grad_b_dec, *[None] * 9


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


def new_scratch(n: int, d_sae: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for `encode_topk`'s pre-activations of n tokens, some at a time.

    `dtype` is what its matmul runs in: the shadow's, autocast's, or that of the inputs.
    """
    shape = (_chunk_tokens(n, d_sae, dtype, device), d_sae)
    return torch.empty(shape, dtype=dtype, device=device)


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None = None,
    *,
    k: int,
    relu: bool = True,
    chunk_tokens: int | None = None,
    shadow: Tensor | None = None,
    rescore: bool | None = None,
    scratch: Tensor | None = None,
    impl: Impl = "auto",
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the k largest of (x − b_dec) @ W_encᵀ + b_enc: values and int64 indices (..., k).

    x (..., d_in), W_enc (d_sae, d_in), b_enc (d_sae), b_dec (d_in) or None. With `relu` values
    below zero come back as zero and get no gradient. The order within a row is unspecified, ties
    are broken arbitrarily, and indices carry no gradient. At most `chunk_tokens` tokens'
    pre-activations exist at a time; None derives it from a buffer of 256 MiB on CPU and 2 GiB on
    GPU (the reference ignores it and keeps all). `scratch` is that buffer, where the caller keeps
    one between calls (`new_scratch`): on a CPU, fresh memory costs a tenth of the matmul or more.

    Under autocast the matmul runs in autocast's dtype and values come back in float32; gradients
    have the dtype of the parameters and are summed in at least float32. First derivatives only.

    `shadow` (d_sae, d_in) is a 16-bit copy of W_enc, kept up to date by the caller, that the matmul
    reads in W_enc's place: it runs in the shadow's dtype, whatever autocast says, and values come
    back as without one. With `rescore` (None: on a CPU, not on a GPU; without meaning where there
    is no shadow) k + max(8, k // 4) candidates are scored so, their pre-activations are computed
    again from W_enc, and the k largest are returned: exact values, and the exact selection unless
    rounding moved a winner out of the candidates. Gradients are those of W_enc either way.

    `check_finite` reads the data to check the floats.
    Raises ValueError or TypeError for shapes, dtypes, devices, data or a k that do not fit.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3.
    Deviation: the ReLU after TopK is optional.
    """
    given = {"x": x, "W_enc": W_enc, "b_enc": b_enc, "b_dec": b_dec}
    check_floating(**given)
    check_same_device(**given, shadow=shadow, scratch=scratch)
    check_at_least_1d(x=x)
    check_shape("W_enc", W_enc, {"d_sae": None, "d_in": x.shape[-1]})
    check_shape("b_enc", b_enc, {"d_sae": W_enc.shape[0]})
    check_shape("b_dec", b_dec, {"d_in": x.shape[-1]})
    d_sae = W_enc.shape[0]
    _check_shadow(shadow, W_enc)
    check_k(k, d_sae, "d_sae")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"`chunk_tokens` must be at least 1; got {chunk_tokens}. Leave it None to derive it."
        )
    check_finite_values(check_finite, **given, shadow=shadow)
    form = choose_form(impl, "encode_topk", *given.values(), shadow)
    if form == "reference":
        options = {"k": k, "relu": relu, "shadow": shadow, "rescore": rescore}
        return encode_topk_reference(x, W_enc, b_enc, b_dec, **options)
    autocast_dtype = _autocast_dtype(x)
    values_dtype = torch.float32 if autocast_dtype else result_dtype(*given.values())
    dtype = autocast_dtype or values_dtype
    n_scored = 0
    if shadow is not None:
        dtype = shadow.dtype
        n_scored = n_candidates(k, d_sae, _rescores(rescore, x))
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    _check_scratch(scratch, d_sae, dtype)
    if scratch is not None:
        chunk_tokens = min(chunk_tokens or scratch.shape[0], scratch.shape[0])
    chunk = chunk_tokens or _chunk_tokens(rows.shape[0], d_sae, dtype, x.device)
    values, indices = _EncodeTopK.apply(
        *(rows, W_enc, b_enc, b_dec, shadow, n_scored),
        *(k, relu, chunk, dtype, values_dtype, form == "triton", scratch),
    )
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)


def _check_scratch(scratch: Tensor | None, d_sae: int, dtype: torch.dtype) -> None:
    """Raise unless `scratch` is None or what the matmul can write into."""
    check_shape("scratch", scratch, {"chunk_tokens": None, "d_sae": d_sae})
    if scratch is None:
        return
    if scratch.dtype != dtype or not scratch.is_contiguous() or not scratch.shape[0]:
        raise ValueError(
            f"`scratch` must be contiguous, of at least one row and {dtype}, in which the matmul "
            f"runs; got {tuple(scratch.shape)} of {scratch.dtype}. Make it with `new_scratch`."
        )


def _check_shadow(shadow: Tensor | None, W_enc: Tensor) -> None:
    """Raise unless `shadow` is None or a 16-bit tensor of W_enc's shape."""
    d_sae, d_in = W_enc.shape
    check_shape("shadow", shadow, {"d_sae": d_sae, "d_in": d_in})
    if shadow is not None and shadow.dtype not in SHADOW_DTYPES:
        raise TypeError(
            f"`shadow` must be torch.bfloat16 or torch.float16; got {shadow.dtype}. Pass "
            "`W_enc.bfloat16()`, or leave it out."
        )
