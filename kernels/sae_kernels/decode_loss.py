"""Decode and squared error with both local gradients.

Maths: with e = x_hat − target of a token, its loss is ‖e‖² and d loss / d value_j =
2⟨W_dec[l_j], e⟩. dL/dW_dec and dL/db_dec follow from the residual target − x_hat, which is kept,
without the rows.
Matryoshka: for prefixes m_1 < … < m_P = d_sae, e_p is the error with the latents below m_p alone,
and loss = Σ_p w_p ‖e_p‖². With the suffix E_p = Σ over q ≥ p of w_q · e_q, d loss / d value_j =
2⟨W_dec[l_j], E_p⟩ for the first prefix p that holds l_j. Pairs are sorted by (token, p), so that a
decode of n·P bags gives what each prefix adds, and n·P suffixes give the dot products.
Shapes: values, indices (..., k), or (p,) with offsets (n + 1,); W_dec (d_sae, d_out); b_dec
(d_out); target (..., d_out) → loss (...), x_hat, residual (..., d_out), grad_values as values.
Dtypes: as in decode.py; losses and grad_values in at least float32.
Bytes: n·k·d_out·itemsize for each of two gathers, of which the second often hits the cache, and
some times n·d_out (P times with prefixes) for errors. One gather for both, which held a token's
rows in registers, took an H200 2 to 5 times as long: its sums over pairs cross warps, and few
programs fit on a processor. Deterministic: yes, bitwise, forward and backward.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

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
    leading_axes,
)
from .decode import (
    decode_rows,
    launch_decode,
    launch_values_grad,
    sparse_decode_reference,
    values_grad,
    weight_grad,
)
from .launching import launch, next_power_of_2, tl, triton
from .ragged import tokens_of_code, tokens_of_pairs
from .segments import block_width, by_latent, result_dtype, warps_for


class DecodeLoss(NamedTuple):
    """What `sparse_decode_loss` returns; gradients flow through `loss` alone."""

    loss: Tensor  # (...), Σ_p prefix_weights[p] · prefix_losses[..., p]
    x_hat: Tensor  # (..., d_out), the whole dictionary's reconstruction
    residual: Tensor  # (..., d_out), target − x_hat
    grad_values: Tensor  # as values, d loss / d value of each pair
    prefix_losses: Tensor  # (..., P), squared error of each prefix; P = 1 without prefixes
    prefix_residuals: Tensor  # (..., P, d_out), −Σ over q ≥ p of weight q · error q; dL/dx_hat / −2


def sparse_decode_loss_reference(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    *,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    offsets: Tensor | None = None,
) -> DecodeLoss:
    """Return the losses by one reference decode a prefix: the specification."""
    ends, weights = _prefixes_and_weights(prefixes, prefix_weights, W_dec.shape[0])
    dtype = _loss_dtype(values, W_dec, b_dec, target)
    tokens = tokens_of_code(indices, offsets)
    losses, errors, grad_values = [], [], torch.zeros_like(values, dtype=dtype)
    for end, weight in zip(ends, weights, strict=True):
        kept = values.where(indices < end, 0)
        x_hat = sparse_decode_reference(kept, indices, W_dec, b_dec, offsets=offsets)
        error = x_hat - target
        losses.append(error.to(dtype).square().sum(-1))
        errors.append(weight * error.detach())
        # Row n, of zeros, belongs to a ragged code's padding.
        rows = F.pad(error.detach().reshape(-1, error.shape[-1]), (0, 0, 0, 1))[tokens]
        dots = (rows * W_dec.detach()[indices]).sum(-1)
        grad_values += 2 * weight * dots.where(indices < end, 0)
    prefix_losses = torch.stack(losses, -1)
    loss = (prefix_losses * prefix_losses.new_tensor(weights)).sum(-1)
    suffixes = torch.stack(errors, -2).flip(-2).cumsum(-2).flip(-2)
    fixed = x_hat.detach(), -error.detach(), grad_values, prefix_losses.detach(), -suffixes
    return DecodeLoss(loss, *fixed)


@triton.jit
def _errors_kernel(
    parts,  # (n, P, d) fp32: what each prefix adds to x_hat; −E_p on return
    bias,  # (d,) or None
    target,  # (n, d)
    weights,  # (P,) fp32, or None for one prefix
    x_hat,  # (n, d), out
    residual,  # (n, d), out; None for one prefix, whose residual is −E_0
    loss,  # (n,) fp32, out
    prefix_losses,  # (n, P) fp32, out
    d,
    n_prefixes,
    LANES: tl.constexpr,
    BD: tl.constexpr,
):
    """Turn one token's parts into errors, from the shortest prefix on, and these into suffixes."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    losses = tl.zeros((LANES,), tl.float32)
    for first in range(0, d, BD):
        cols = first + tl.arange(0, BD)
        inside = cols < d
        at = parts + token * n_prefixes * d + cols
        y = tl.load(target + token * d + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.zeros((BD,), tl.float32)
        if bias is not None:
            x += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
        for p in range(n_prefixes):
            x += tl.load(at + p * d, mask=inside, other=0.0)
            error = tl.where(inside, x - y, 0.0)
            tl.store(at + p * d, -error, mask=inside)
            losses += tl.where(lane == p, tl.sum(error * error, axis=0), 0.0)
        tl.store(x_hat + token * d + cols, x, mask=inside)
        if weights is not None:
            tl.store(residual + token * d + cols, y - x, mask=inside)
            # What follows reads what other threads of this program may have stored.
            tl.debug_barrier()
            suffix = tl.zeros((BD,), tl.float32)
            for step in range(n_prefixes):
                p = n_prefixes - 1 - step
                suffix += tl.load(weights + p) * tl.load(at + p * d, mask=inside, other=0.0)
                tl.store(at + p * d, suffix, mask=inside)
    real = lane < n_prefixes
    weighted = losses
    if weights is not None:
        weighted = losses * tl.load(weights + lane, mask=real, other=0.0)
    tl.store(loss + token, tl.sum(weighted, axis=0))
    tl.store(prefix_losses + token * n_prefixes + lane, losses, mask=real)


def launch_decode_loss(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    ends: Sequence[int],
    weights: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, x_hat, residual, grad_values, prefix_losses and suffixes (see `decode_loss`).

    The rows are gathered once for the parts and once for the dot products.
    """
    (n, d), n_prefixes, several = target.shape, len(ends), len(ends) > 1
    dtype = result_dtype(values, W_dec, b_dec, target)
    code, order = (values, indices, offsets), None
    if several:
        order, bags = _by_first_prefix(indices, offsets, n, ends)
        code = values.reshape(-1)[order], indices.reshape(-1)[order], bags
    parts = launch_decode(*code, W_dec, None, torch.float32)
    x_hat, residual = (W_dec.new_empty((n, d), dtype=dtype) for _ in range(2))
    loss = parts.new_empty(n)
    prefix_losses = parts.new_empty((n, n_prefixes))
    width = block_width(d, torch.float32)
    launch(
        _errors_kernel,
        (n,),
        *(parts, b_dec, target, _weights_on(tuple(weights), W_dec.device) if several else None),
        *(x_hat, residual if several else None, loss, prefix_losses, d, n_prefixes),
        num_warps=warps_for(width, torch.float32),
        LANES=next_power_of_2(n_prefixes),
        BD=width,
    )
    grad_values = launch_values_grad(parts, *code[1:], W_dec).mul_(-2)
    if order is None:
        return loss, x_hat, parts.to(dtype), grad_values, prefix_losses, parts.new_empty(0)
    grad_values = torch.empty_like(grad_values).scatter_(0, order, grad_values)
    suffixes = parts.view(n, n_prefixes, d).to(dtype)
    return loss, x_hat, residual, grad_values.view(indices.shape), prefix_losses, suffixes


@lru_cache(maxsize=16)
def _weights_on(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the prefixes' weights as a tensor: copied to a device once, not at every step."""
    return torch.tensor(weights, device=device)


def _decode_loss_by_torch(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    ends: Sequence[int],
    weights: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `launch_decode_loss`, with one decode and one pass of dot products for all prefixes."""
    n, d = target.shape
    dtype = result_dtype(values, W_dec, b_dec, target)
    wide = torch.promote_types(dtype, torch.float32)
    code = values.to(wide), indices, offsets
    if len(ends) == 1:
        x_hat = decode_rows(*code, W_dec, b_dec, False)
        residual = target - x_hat
        grad_values = values_grad(residual, indices, offsets, W_dec, False).mul_(-2)
        loss = torch.linalg.vector_norm(residual, dim=1).square_()
        x_hat, residual = x_hat.to(dtype), residual.to(dtype)
        return loss, x_hat, residual, grad_values, loss[:, None].clone(), residual.new_empty(0)
    order, bags = _by_first_prefix(indices, offsets, n, ends)
    code = code[0].reshape(-1)[order], indices.reshape(-1)[order], bags
    parts = decode_rows(*code, W_dec, None, False).reshape(n, len(ends), d)
    x_hats = parts.cumsum(1) if b_dec is None else parts.cumsum(1) + b_dec
    errors = x_hats - target[:, None]
    prefix_losses = errors.square().sum(-1)
    scales = errors.new_tensor(weights)
    suffixes = (errors * scales[:, None]).flip(1).cumsum(1).flip(1)
    rows = suffixes.reshape(n * len(ends), d)
    grad_values = 2 * values_grad(rows, code[1], code[2], W_dec, False)
    grad_values = torch.empty_like(grad_values).scatter_(0, order, grad_values)
    grad_values = grad_values.reshape(indices.shape)
    loss = prefix_losses @ scales
    residual = -errors[:, -1].to(dtype)
    suffixes = -suffixes.to(dtype)
    x_hat = x_hats[:, -1].contiguous().to(dtype)
    return loss, x_hat, residual, grad_values, prefix_losses, suffixes


def _by_first_prefix(
    indices: Tensor, offsets: Tensor | None, n: int, ends: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sort the pairs by (token, first prefix that holds the latent).

    Returns their order (p,) and the offsets (n·P + 1,) of the n·P bags.
    """
    tokens, flat = tokens_of_code(indices, offsets).reshape(-1), indices.reshape(-1)
    bags = tokens * len(ends)
    for end in ends[:-1]:  # a comparison each: a GPU would wait for a tensor of the ends
        bags = bags + (flat >= end)
    segments = by_latent(bags.where(tokens < n, n * len(ends)), n * len(ends))
    return segments.order, segments.offsets


@torch.library.custom_op("sae_kernels::sparse_decode_loss", mutates_args=())
def decode_loss(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    ends: Sequence[int],
    weights: Sequence[float],
    with_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss (n,), x_hat, residual (n, d), grad_values, prefix_losses (n, P) and suffixes.

    suffixes (n, P, d) holds −E_p of the module's docstring; with one prefix it is empty, being the
    residual.
    """
    form = launch_decode_loss if with_triton else _decode_loss_by_torch
    code = values.contiguous(), indices.contiguous(), offsets
    return form(*code, W_dec.contiguous(), b_dec, target.contiguous(), ends, weights)


@decode_loss.register_fake
def _(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    ends: Sequence[int],
    weights: Sequence[float],
    with_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, d = target.shape
    dtype, wide = (
        result_dtype(values, W_dec, b_dec, target),
        _loss_dtype(values, W_dec, b_dec, target),
    )
    several = len(ends) > 1
    return (
        target.new_empty((n,), dtype=wide),
        target.new_empty((n, d), dtype=dtype),
        target.new_empty((n, d), dtype=dtype),
        values.new_empty(indices.shape, dtype=wide),
        target.new_empty((n, len(ends)), dtype=wide),
        target.new_empty((n, len(ends), d) if several else (0,), dtype=dtype),
    )


class _SparseDecodeLoss(torch.autograd.Function):
    """The losses, with gradients to values, W_dec, b_dec and target that need no decoder row."""

    @staticmethod
    def forward(ctx, values, indices, offsets, W_dec, b_dec, target, ends, weights, with_triton):
        loss, x_hat, residual, grad_values, prefix_losses, suffixes = decode_loss(
            values, indices, offsets, W_dec, b_dec, target, ends, weights, with_triton
        )
        ctx.mark_non_differentiable(x_hat, residual, grad_values, prefix_losses, suffixes)
        kept = residual if len(ends) == 1 else suffixes
        ctx.save_for_backward(values, indices, offsets, kept, grad_values)
        ctx.ends, ctx.with_triton = list(ends), with_triton
        ctx.weight_shape, ctx.weight_dtype = W_dec.shape, W_dec.dtype
        ctx.bias_dtype = None if b_dec is None else b_dec.dtype
        ctx.target_dtype = target.dtype
        return loss, x_hat, residual, grad_values, prefix_losses, suffixes

    @staticmethod
    def backward(ctx, *grads):
        scale = 2 * grads[0]  # (n,)
        values, indices, offsets, suffixes, dots = ctx.saved_tensors
        n, d = scale.numel(), ctx.weight_shape[1]
        suffixes = suffixes.reshape(n, len(ctx.ends), d)
        per_pair = _per_pair(scale, indices, offsets)
        grad_values = grad_weight = grad_bias = grad_target = None
        if ctx.needs_input_grad[0]:
            grad_values = (dots * (per_pair / 2)).to(values.dtype)
        if ctx.needs_input_grad[3]:
            grad_weight = _weight_grad(ctx, values * -per_pair, indices, offsets, suffixes)
        if ctx.needs_input_grad[4]:
            # E_0 has the weighted errors of all prefixes, in each of which the bias stands.
            grad_bias = (-scale.to(suffixes.dtype) @ suffixes[:, 0]).to(ctx.bias_dtype)
        if ctx.needs_input_grad[5]:
            grad_target = (scale[:, None] * suffixes[:, 0]).to(ctx.target_dtype)
        return grad_values, None, None, grad_weight, grad_bias, grad_target, None, None, None


def _per_pair(scale: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Return `scale` (n,) of each pair's token, broadcast against `indices`; 0 for padding."""
    if offsets is None:
        return scale[:, None]
    tokens = tokens_of_pairs(offsets, indices.numel())
    return torch.cat([scale, scale.new_zeros(1)])[tokens]


def _weight_grad(
    ctx, weights: Tensor, indices: Tensor, offsets: Tensor | None, suffixes: Tensor
) -> Tensor:
    """Return dL/dW_dec: each pair brings its token's suffix of the first prefix that holds it."""
    n, n_prefixes, d = suffixes.shape
    d_sae = ctx.weight_shape[0]
    if n_prefixes > 1:
        order, offsets = _by_first_prefix(indices, offsets, n, ctx.ends)
        weights, indices = weights.reshape(-1)[order], indices.reshape(-1)[order]
    rows = suffixes.reshape(n * n_prefixes, d)
    return weight_grad(weights, indices, offsets, rows, d_sae, ctx.weight_dtype, ctx.with_triton)


def _loss_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of the losses: at least float32."""
    return torch.promote_types(result_dtype(*tensors), torch.float32)


def _prefixes_and_weights(
    prefixes: Sequence[int] | None, weights: Sequence[float] | None, d_sae: int
) -> tuple[list[int], list[float]]:
    """Return the prefixes' ends and weights; raise ValueError where they do not fit `d_sae`."""
    ends = [d_sae] if prefixes is None else [int(end) for end in prefixes]
    starts = [0, *ends[:-1]]
    if not ends or ends[-1] != d_sae or any(a >= b for a, b in zip(starts, ends, strict=True)):
        raise ValueError(
            f"`prefixes` must ascend from at least 1 to d_sae={d_sae}; got {ends}. Add d_sae as "
            "the last prefix, or leave `prefixes` out for one loss."
        )
    given = [1.0] * len(ends) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(ends):
        raise ValueError(
            f"`prefix_weights` must have one weight a prefix; got {len(given)} weights for "
            f"{len(ends)} prefixes. Pass as many, or leave it out for weights of 1."
        )
    return ends, given


def sparse_decode_loss(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    *,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    offsets: Tensor | None = None,
    impl: Impl = "auto",
    check_indices: bool = False,
    check_finite: bool = False,
) -> DecodeLoss:
    """Return each token's squared error ‖x_hat − target‖², and what the same pass gives besides.

    values, indices, W_dec, b_dec and offsets as in `sparse_decode`; target (..., d_out) is what
    x_hat should be: the input for an autoencoder, another activation for a transcoder.
    The losses are sums over d_out, not means, in at least float32, one a token: weight and average
    them as you like. `prefixes` (ascending, the last d_sae) makes it Matryoshka's loss: `loss` is
    the sum over prefixes of `prefix_weights` (1 each if None) times the squared error of decoding
    with the latents below that prefix alone.

    Gradients reach values, W_dec, b_dec and target through `loss` only. x_hat, residual,
    grad_values (d loss / d value, for trainers that go on by hand) and prefix_losses carry none.
    First derivatives only.

    `check_indices` and `check_finite` as in `sparse_decode`.
    Raises ValueError or TypeError for shapes, dtypes, devices, data or prefixes that do not fit.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders"; Bussmann et al. 2025,
    "Learning Multi-Level Features with Matryoshka Sparse Autoencoders", eq. 4. Deviation: weights
    of the prefixes.
    """
    check_floating(values=values, W_dec=W_dec, b_dec=b_dec, target=target)
    check_same_device(
        values=values, indices=indices, offsets=offsets, W_dec=W_dec, b_dec=b_dec, target=target
    )
    check_code("values", values, indices, offsets)
    check_shape("W_dec", W_dec, {"d_sae": None, "d_out": None})
    check_shape("b_dec", b_dec, {"d_out": W_dec.shape[1]})
    check_shape("target", target, {**leading_axes(indices, offsets), "d_out": W_dec.shape[1]})
    ends, weights = _prefixes_and_weights(prefixes, prefix_weights, W_dec.shape[0])
    check_index_range(indices, W_dec.shape[0], check_indices)
    check_finite_values(check_finite, values=values, W_dec=W_dec, b_dec=b_dec, target=target)
    form = choose_form(impl, "sparse_decode_loss", values, W_dec, b_dec, target)
    if form == "reference":
        return sparse_decode_loss_reference(
            values,
            indices,
            W_dec,
            b_dec,
            target,
            prefixes=ends,
            prefix_weights=weights,
            offsets=offsets,
        )
    leading = target.shape[:-1]
    rows = target.reshape(leading.numel(), target.shape[-1])
    pairs = values, indices
    if offsets is None:
        pairs = (half.reshape(rows.shape[0], indices.shape[-1]) for half in pairs)
    inner = weights if len(ends) > 1 else [1.0]  # one weight is a factor, put on below
    found = _SparseDecodeLoss.apply(
        *pairs, offsets, W_dec, b_dec, rows, ends, inner, form == "triton"
    )
    loss, x_hat, residual, grad_values, prefix_losses, suffixes = found
    if len(ends) == 1:
        suffixes = residual
        if weights != inner:
            loss, grad_values, suffixes = (
                part * weights[0] for part in (loss, grad_values, residual)
            )
    return DecodeLoss(
        loss.reshape(leading),
        x_hat.reshape(target.shape),
        residual.reshape(target.shape),
        grad_values.reshape(values.shape),
        prefix_losses.reshape(*leading, len(ends)),
        suffixes.reshape(*leading, len(ends), target.shape[-1]),
    )
