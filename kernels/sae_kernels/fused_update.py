"""One Adam step of a sparse dictionary, straight from its code: no weight gradient is stored.

Maths, for each latent l with the pairs P(l) of the code, g = dL/dx_hat and da = dL/dpre_acts:
  G_dec = Σ over P(l) of a · g[token],  G_enc = Σ of da · x[token],  G_b = Σ of da;
  G_dec −= ⟨G_dec, W_dec[l]⟩ W_dec[l]   (the part along the row would only rescale it);
  Adam on W_dec[l], W_enc[l] and b_enc[l]:  m ← β₁m + (1 − β₁)G,  v ← β₂v + (1 − β₂)G²,
  w ← w − lr/c₁ · m / (√v/√c₂ + ε),  c_i = 1 − β_i^step;
  W_dec[l] ← W_dec[l] / ‖W_dec[l]‖;  the shadows get the new rows, rounded.
With x = input − b_dec, b_dec's gradient has the encoder's term −Σ_l G_b[l] · W_enc[l], by the rows
before their update; it is returned.
Shapes: the code as in decode.py; g (n, d_out), x (n, d_in); W_enc (d_sae, d_in), W_dec (d_sae,
d_out). Dtypes: weights float32; shadows any float or None; moments as in moments.py; the code, g
and x any float.
Bytes: two gathers of n·k rows, and a read and write of weights and moments: 26 B a weight in
float32 with a 16-bit shadow, 18 with bfloat16 moments, 14 in 8 bits.
Deterministic: yes, bitwise; sums have a fixed order (segments.py) and rounding is a function of the
step. Every row is updated, whether its latent fired or not, as Adam's moments demand; `lazy` skips
those that did not (another optimiser: their moments stand still).
Source: Kingma & Ba 2015, "Adam", algorithm 1; Bricken et al. 2023 for the projection.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    Impl,
    check_code,
    check_floating,
    check_same_device,
    check_shape,
    choose_form,
)
from .launching import cdiv, launch, next_power_of_2, tl, triton
from .moments import Moments, load_moments, read_moments, store_moments, write_moments_
from .segments import (
    TILE,
    Segments,
    by_latent,
    launch_segment_sums,
    launch_tile_sums,
    sum_segment,
    weighted_row_sums,
    weighted_sums,
)

WIDEST_ROW = 16384  # a program holds whole rows, for their norms


class AdamScalars(NamedTuple):
    """What one step of Adam needs besides tensors of the weights' size.

    `rates` lies on the device, so that a captured CUDA graph sees each step's values: lr, c₁ and c₂
    of the module's docstring, and `step` counts from 1.
    """

    rates: Tensor  # (3,) float32
    step: Tensor  # () int64
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


def adam_scalars(
    lr: float | Tensor,
    step: int | Tensor,
    device: torch.device,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> AdamScalars:
    """Return the scalars of step `step` (from 1); lr and step may be 0-d tensors on the device."""
    count = torch.as_tensor(step, device=device, dtype=torch.int64)
    rate = torch.as_tensor(lr, device=device, dtype=torch.float64)
    # In float64: 1 − 0.999 in float32 is off by 6e-5 of itself.
    corrections = [
        -torch.expm1(count * torch.log(torch.full_like(rate, b))) for b in (beta1, beta2)
    ]
    return AdamScalars(torch.stack([rate, *corrections]).float(), count, beta1, beta2, eps)


class Dictionary(NamedTuple):
    """The tensors that an update writes in place. Rows of all are latents."""

    W_enc: Tensor  # (d_sae, d_in) float32
    W_dec: Tensor  # (d_sae, d_out) float32
    b_enc: Tensor  # (d_sae,) float32
    enc_moments: Moments
    dec_moments: Moments
    b_enc_m: Tensor  # (d_sae,) float32
    b_enc_v: Tensor  # (d_sae,) float32
    enc_shadow: Tensor | None = None  # (d_sae, d_in), what the next step's matmul reads
    dec_shadow: Tensor | None = None  # (d_sae, d_out)


class Code(NamedTuple):
    """A step's sparse code with its gradients, in token order; ragged with `offsets`."""

    values: Tensor  # (n, k) or (p,)
    indices: Tensor  # as values, int64
    grad_pre_acts: Tensor  # as values, dL/dpre_acts
    offsets: Tensor | None = None  # (n + 1,)


class Gradients(NamedTuple):
    """Weight gradients that exist as tensors: for clipping, averaging over processes, parity."""

    W_enc: Tensor  # (d_sae, d_in)
    W_dec: Tensor  # (d_sae, d_out)
    b_enc: Tensor  # (d_sae,)


@triton.jit
def _adam(grad, m, v, rates, beta1, beta2, eps):
    """Return Adam's step to subtract, and the new moments."""
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    denominator = tl.sqrt(v) / tl.sqrt(tl.load(rates + 2)) + eps
    return tl.load(rates) / tl.load(rates + 1) * m / denominator, m, v


@triton.jit
def _update_row(
    row, cols, d, grad, weight, shadow, m, v, m_scale, v_scale,
    rates, step, beta1, beta2, eps, UNIT: tl.constexpr,
):  # fmt: skip
    """Take one Adam step with a row of a matrix; return the row as it was."""
    inside = cols < d
    at = row * d + cols
    old = tl.load(weight + at, mask=inside, other=0.0)
    if UNIT:
        grad -= tl.sum(grad * old, axis=0) * old
    first, second = load_moments(row, at, inside, m, v, m_scale, v_scale)
    change, first, second = _adam(grad, first, second, rates, beta1, beta2, eps)
    store_moments(row, cols, at, inside, step, first, second, m, v, m_scale, v_scale)
    new = old - change
    if UNIT:
        norm = tl.sqrt(tl.sum(tl.where(inside, new * new, 0.0), axis=0))
        new = new / tl.maximum(norm, 1e-12)
    tl.store(weight + at, new, mask=inside)
    if shadow is not None:
        tl.store(shadow + at, new.to(shadow.dtype.element_ty), mask=inside)
    return old


@triton.jit
def _gradient_row(
    latent, order, tokens, offsets, weights, rows, tile_rows, tile_weights, dense, dense_bias,
    cols, d, TILE: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Return one latent's weight and bias gradient: summed from its pairs, or read if `dense`."""
    if dense is None:
        row, bias = sum_segment(
            latent, order, tokens, offsets, weights, rows, tile_rows, tile_weights, cols, d,
            TILE, BP, BD,
        )  # fmt: skip
    else:
        row = tl.load(dense + latent * d + cols, mask=cols < d, other=0.0).to(tl.float32)
        bias = 0.0
        if dense_bias is not None:
            bias = tl.load(dense_bias + latent).to(tl.float32)
    return row, bias


@triton.jit
def _update_kernel(
    order,  # (p,) int64, or None with dense gradients, as all to `tile_weights`
    tokens,  # (p,) int64
    offsets,  # (d_sae + 1,) int64
    pair_weights,  # (p,), unsorted
    rows,  # (n, d)
    tile_rows,  # (n_tiles, d) fp32
    tile_weights,  # (n_tiles,) fp32
    dense,  # (d_sae, d), or None
    dense_bias,  # (d_sae,), or None
    weight,  # (d_sae, d)
    shadow,  # (d_sae, d), or None
    m,
    v,
    m_scale,
    v_scale,
    bias,  # (d_sae,), or None for the decoder, as all to `bias_terms`
    bias_m,
    bias_v,
    bias_terms,  # (n_programs, d) fp32, out: Σ G_b · W_enc over a program's latents
    rates,  # (3,) fp32
    step_ptr,  # () int64
    beta1,
    beta2,
    eps,
    d_sae,
    d,
    LAZY: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Update ROWS neighbouring rows of one matrix, one after the other, and its bias if it has one.

    The encoder and the decoder are a launch each: together they need more registers than there are.
    """
    program = tl.program_id(0).to(tl.int64)
    step = tl.load(step_ptr)
    cols = tl.arange(0, BD)
    bias_term = tl.zeros((BD,), tl.float32)
    for latent in range(program * ROWS, tl.minimum((program + 1) * ROWS, d_sae)):
        is_due = True
        if LAZY:
            is_due = tl.load(offsets + latent) < tl.load(offsets + latent + 1)
        if is_due:
            grad, bias_grad = _gradient_row(
                latent, order, tokens, offsets, pair_weights, rows, tile_rows, tile_weights, dense,
                dense_bias, cols, d, TILE, BP, BD,
            )  # fmt: skip
            old = _update_row(
                latent, cols, d, grad, weight, shadow, m, v, m_scale, v_scale, rates, step,
                beta1, beta2, eps, UNIT,
            )  # fmt: skip
            if bias is not None:
                bias_term += bias_grad * old
                first = tl.load(bias_m + latent)
                second = tl.load(bias_v + latent)
                change, first, second = _adam(bias_grad, first, second, rates, beta1, beta2, eps)
                tl.store(bias_m + latent, first)
                tl.store(bias_v + latent, second)
                tl.store(bias + latent, tl.load(bias + latent) - change)
    if bias is not None:
        tl.store(bias_terms + program * d + cols, bias_term, mask=cols < d)


# Latents a program: 16 share one partial sum of b_dec's encoder term, 1/16 of a weight's bytes.
ROWS = 16
# Left alone, ptxas aims for more programs at once and spills a few registers to get them.
MOST_REGISTERS, REGISTERS_OF_A_PROCESSOR = 255, 65536
PAIRS = 4  # rows gathered at once: with whole rows of 4096 columns, 64 KB


def launch_update(
    dictionary: Dictionary,
    scalars: AdamScalars,
    segments: Segments | None,
    code: Code | None,
    grad_rows: Tensor | None,
    input_rows: Tensor | None,
    gradients: Gradients | None,
    unit_norm: bool,
    lazy: bool,
) -> Tensor:
    """Update `dictionary` in place; return Σ_l G_b[l] · W_enc[l] (d_in) by the old rows, float32.

    Either `segments`, `code` and the two rows, or `gradients`.
    """
    d_sae, d_in = dictionary.W_enc.shape
    bias_terms = dictionary.W_enc.new_empty((cdiv(d_sae, ROWS), d_in))
    bias = dictionary.b_enc, dictionary.b_enc_m, dictionary.b_enc_v, bias_terms
    if segments is not None and code is not None:
        dec_from = *_pairs(segments, code.values, grad_rows), None, None
        enc_from = *_pairs(segments, code.grad_pre_acts, input_rows), None, None
    else:
        assert gradients is not None
        dec_from = *(None,) * 7, gradients.W_dec, None
        enc_from = *(None,) * 7, gradients.W_enc, gradients.b_enc
    for source, weight, shadow, moments, biases, is_unit in (
        (
            dec_from,
            dictionary.W_dec,
            dictionary.dec_shadow,
            dictionary.dec_moments,
            None,
            unit_norm,
        ),
        (enc_from, dictionary.W_enc, dictionary.enc_shadow, dictionary.enc_moments, bias, False),
    ):
        num_warps = _warps(weight.shape[1], moments)
        launch(
            _update_kernel,
            (bias_terms.shape[0],),
            *(*source, weight, shadow, *moments, *(biases or (None,) * 4)),
            *(scalars.rates, scalars.step, scalars.beta1, scalars.beta2, scalars.eps),
            *weight.shape,
            num_warps=num_warps,
            maxnreg=min(MOST_REGISTERS, REGISTERS_OF_A_PROCESSOR // (32 * num_warps)),
            LAZY=lazy,
            UNIT=is_unit,
            ROWS=ROWS,
            TILE=TILE,
            BP=PAIRS,
            BD=next_power_of_2(weight.shape[1]),
        )
    return bias_terms.sum(0)


def _pairs(segments: Segments, weights: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
    """Return what sums a matrix's gradient from pairs, tiles of hubs summed already."""
    assert rows is not None
    flat = weights.reshape(-1)
    lists = segments.order, segments.tokens, segments.offsets
    return *lists, flat, rows, *launch_tile_sums(segments, flat, rows)


def _warps(d: int, moments: Moments) -> int:
    """Return warps for rows of `d`: 16 elements a thread, 8 where more than they need registers.

    Rounding does, and so do rows off a multiple of 16 bytes: each element has an address.
    """
    is_plain = moments.m.dtype == torch.float32 and d % 16 == 0
    return min(16, max(1, next_power_of_2(d) // (512 if is_plain else 256)))


# ---- the torch form: gradients as matrices, then the same arithmetic


def sparse_gradients(
    code: Code, grad_x_hat: Tensor, x: Tensor, d_sae: int, *, impl: Impl = "auto"
) -> Gradients:
    """Return the weight gradients of a code as tensors, float32, with one sort for all three.

    grad_x_hat (n, d_out) is dL/dx_hat and x (n, d_in) what the encoder multiplied. For clipping,
    and for averaging over processes before `dense_update_`.
    """
    form = choose_form(impl, "sparse_gradients", code.values, code.grad_pre_acts, grad_x_hat, x)
    segments = by_latent(code.indices, d_sae, code.offsets)
    if form == "triton":
        dec, _ = launch_segment_sums(segments, code.values, grad_x_hat, torch.float32)
        enc, bias = launch_segment_sums(segments, code.grad_pre_acts, x, torch.float32)
        return Gradients(enc, dec, bias)
    values, grad_pre_acts = code.values.float(), code.grad_pre_acts.float()
    return Gradients(
        weighted_row_sums(segments, grad_pre_acts, x.float().contiguous()),
        weighted_row_sums(segments, values, grad_x_hat.float().contiguous()),
        weighted_sums(segments, grad_pre_acts),
    )


def _update_by_torch(
    dictionary: Dictionary,
    scalars: AdamScalars,
    gradients: Gradients,
    unit_norm: bool,
    due: Tensor | None,
) -> Tensor:
    """As `launch_update`, with dense gradients; `due` (d_sae,) bool are the latents to update."""
    old_W_enc = dictionary.W_enc.clone()
    dec_grad = gradients.W_dec
    if unit_norm:
        along = (dec_grad * dictionary.W_dec).sum(1, keepdim=True)
        dec_grad = dec_grad - along * dictionary.W_dec
    rows = dictionary.W_enc, dictionary.W_dec
    _matrix_step(rows[0], gradients.W_enc, dictionary.enc_moments, scalars, False, due)
    _matrix_step(rows[1], dec_grad, dictionary.dec_moments, scalars, unit_norm, due)
    bias_moments = dictionary.b_enc_m, dictionary.b_enc_v
    change, *new = _adam_by_torch(gradients.b_enc, *bias_moments, scalars)
    for old, value in zip(bias_moments, new, strict=True):
        old.copy_(value if due is None else value.where(due, old))
    dictionary.b_enc.sub_(change if due is None else change.where(due, 0))
    for shadow, weight in zip((dictionary.enc_shadow, dictionary.dec_shadow), rows, strict=True):
        if shadow is not None:
            shadow.copy_(weight)
    return gradients.b_enc @ old_W_enc


def _adam_by_torch(
    grad: Tensor, m: Tensor, v: Tensor, scalars: AdamScalars
) -> tuple[Tensor, Tensor, Tensor]:
    lr, correction1, correction2 = scalars.rates.unbind()
    m = scalars.beta1 * m + (1 - scalars.beta1) * grad
    v = scalars.beta2 * v + (1 - scalars.beta2) * grad * grad
    return lr / correction1 * m / (v.sqrt() / correction2.sqrt() + scalars.eps), m, v


def _matrix_step(
    weight: Tensor,
    grad: Tensor,
    moments: Moments,
    scalars: AdamScalars,
    unit_norm: bool,
    due: Tensor | None,
) -> None:
    change, m, v = _adam_by_torch(grad, *read_moments(moments), scalars)
    new = weight - change
    if unit_norm:
        new = new / new.norm(dim=1, keepdim=True).clamp_min(1e-12)
    before = [tensor.clone() for tensor in moments] if due is not None else []
    write_moments_(moments, m, v, scalars.step)
    if due is not None:
        new = new.where(due[:, None], weight)
        for tensor, old in zip(moments, before, strict=True):
            tensor[~due] = old[~due]
    weight.copy_(new)


# ---- the public ops


def fused_update_(
    dictionary: Dictionary,
    scalars: AdamScalars,
    code: Code,
    grad_x_hat: Tensor,
    x: Tensor,
    *,
    unit_norm: bool = True,
    lazy: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Take one Adam step with W_enc, W_dec and b_enc in place, from a code and its gradients.

    grad_x_hat (n, d_out) is dL/dx_hat, x (n, d_in) what the encoder multiplied, and
    `code.grad_pre_acts` dL/dpre_acts of each pair: 0 where the activation function stopped it.
    `unit_norm` projects W_dec's gradient and renormalises its rows; `lazy` skips latents without
    pairs. On a GPU no gradient of a weight's size exists; the torch form makes them.

    Returns the encoder's part of dL/db_dec, −Σ_l G_b[l] · W_enc[l] (d_in) by the rows before the
    step, for an encoder that reads x = input − b_dec. The decoder's part is grad_x_hat.sum(0).

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    _check_dictionary(dictionary)
    check_code("code.values", code.values, code.indices, code.offsets)
    check_code("code.grad_pre_acts", code.grad_pre_acts, code.indices, code.offsets)
    n = code.indices.shape[0] if code.offsets is None else code.offsets.numel() - 1
    check_shape("grad_x_hat", grad_x_hat, {"n": n, "d_out": dictionary.W_dec.shape[1]})
    check_shape("x", x, {"n": n, "d_in": dictionary.W_enc.shape[1]})
    check_same_device(W_enc=dictionary.W_enc, values=code.values, grad_x_hat=grad_x_hat, x=x)
    form = choose_form(
        impl, "fused_update_", code.values, code.grad_pre_acts, grad_x_hat, x, dictionary.W_enc
    )
    d_sae = dictionary.W_enc.shape[0]
    if form == "triton" and _fits(dictionary):
        segments = by_latent(code.indices, d_sae, code.offsets)
        rows = grad_x_hat.contiguous(), x.contiguous()
        return -launch_update(dictionary, scalars, segments, code, *rows, None, unit_norm, lazy)
    gradients = sparse_gradients(code, grad_x_hat, x, d_sae)
    due = None
    if lazy:
        offsets = by_latent(code.indices, d_sae, code.offsets).offsets
        due = offsets[1:] > offsets[:-1]
    return -_update_by_torch(dictionary, scalars, gradients, unit_norm, due)


def dense_update_(
    dictionary: Dictionary,
    scalars: AdamScalars,
    gradients: Gradients,
    *,
    unit_norm: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """Take the step of `fused_update_` from gradients that exist as tensors; return the same.

    For gradients that were clipped or averaged over processes: see `sparse_gradients`.
    """
    _check_dictionary(dictionary)
    for name, gradient in gradients._asdict().items():
        weight: Tensor = getattr(dictionary, name)
        axes = dict(zip(("d_sae", "d"), weight.shape, strict=False))
        check_shape(f"gradients.{name}", gradient, {**axes})
    check_same_device(dictionary=dictionary.W_enc, **gradients._asdict())
    form = choose_form(impl, "dense_update_", *gradients, dictionary.W_enc)
    if form == "triton" and _fits(dictionary):
        contiguous = Gradients(*(gradient.contiguous() for gradient in gradients))
        return -launch_update(
            dictionary, scalars, None, None, None, None, contiguous, unit_norm, False
        )
    wide = Gradients(*(gradient.float() for gradient in gradients))
    return -_update_by_torch(dictionary, scalars, wide, unit_norm, None)


def _fits(dictionary: Dictionary) -> bool:
    """Return whether a program can hold the rows; wider ones take the torch form."""
    return max(dictionary.W_enc.shape[1], dictionary.W_dec.shape[1]) <= WIDEST_ROW


def _check_dictionary(dictionary: Dictionary) -> None:
    """Raise unless the tensors of `dictionary` are contiguous, fit together and are float32."""
    d_sae, d_in = dictionary.W_enc.shape
    check_shape("W_dec", dictionary.W_dec, {"d_sae": d_sae, "d_out": None})
    d_out = dictionary.W_dec.shape[1]
    for name in ("b_enc", "b_enc_m", "b_enc_v"):
        check_shape(name, getattr(dictionary, name), {"d_sae": d_sae})
    shapes = {"enc": {"d_sae": d_sae, "d_in": d_in}, "dec": {"d_sae": d_sae, "d_out": d_out}}
    for side, axes in shapes.items():
        moments: Moments = getattr(dictionary, f"{side}_moments")
        check_shape(f"{side}_moments.m", moments.m, {**axes})
        check_shape(f"{side}_moments.v", moments.v, {**axes})
        check_shape(f"{side}_shadow", getattr(dictionary, f"{side}_shadow"), {**axes})
    check_floating(W_enc=dictionary.W_enc, W_dec=dictionary.W_dec, b_enc=dictionary.b_enc)
    for name in ("W_enc", "W_dec", "b_enc"):
        weight: Tensor = getattr(dictionary, name)
        if weight.dtype != torch.float32 or not weight.is_contiguous():
            raise ValueError(
                f"`{name}` must be contiguous and float32, as it is updated in place; got "
                f"{weight.dtype} with strides {weight.stride()}. Keep masters in float32, and "
                "pass 16-bit copies as shadows."
            )
