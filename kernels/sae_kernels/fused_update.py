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
Groups: several dictionaries of one shape may be updated at once, one behind the other as rows, each
with a learning rate and a part of the returned term of its own: `AdamScalars.rates` of (G, 3).
Source: Kingma & Ba 2015, "Adam", algorithm 1; Bricken et al. 2023 for the projection.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

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
    of_latents,
    sorted_row_sums,
    sorted_sums,
    sum_segment,
)

WIDEST_ROW = 16384  # a program holds whole rows, for their norms


class AdamScalars(NamedTuple):
    """What one step of Adam needs besides tensors of the weights' size.

    `rates` lies on the device, so that a captured CUDA graph sees each step's values: lr, c₁ and c₂
    of the module's docstring, and `step` counts from 1. With (G, 3) the rows are those of G
    dictionaries of equal width, each with its own.
    """

    rates: Tensor  # (3,) or (G, 3) float32
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
    """Return the scalars of step `step` (from 1); lr and step may be 0-d tensors on the device.

    lr (G,) gives those of G dictionaries.
    """
    count = _scalar(step, device, torch.int64)
    rate = _scalar(lr, device, torch.float64)
    # In float64: 1 − 0.999 in float32 is off by 6e-5 of itself.
    corrections = [
        -torch.expm1(count * torch.log(torch.full_like(rate, b))) for b in (beta1, beta2)
    ]
    return AdamScalars(torch.stack([rate, *corrections], -1).float(), count, beta1, beta2, eps)


def _scalar(number: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a number as a tensor; filled in on the device, where a copy would be waited for."""
    if isinstance(number, Tensor):
        return number.to(device, dtype)
    return torch.full((), number, dtype=dtype, device=device)


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


class RowGradients(NamedTuple):
    """Gradients of some latents, added to those of the code: AuxK's, of the dead ones.

    A latent of d_sae or more is padding, whose gradients must be zero; the others are distinct.
    """

    latents: Tensor  # (m,) int64
    W_enc: Tensor  # (m, d_in)
    W_dec: Tensor  # (m, d_out)
    b_enc: Tensor  # (m,)


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
def _more_of_row(slot, row, bias, more, more_bias, cols, d):
    """Add what `RowGradients` has for a latent; `slot` is its row there, negative for none."""
    if slot >= 0:
        row += tl.load(more + slot * d + cols, mask=cols < d, other=0.0).to(tl.float32)
        if more_bias is not None:
            bias += tl.load(more_bias + slot).to(tl.float32)
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
    slots,  # (d_sae + 1,) int64, a latent's row of `more` or -1; or None, as all to `more_bias`
    more,  # (m, d)
    more_bias,  # (m,), or None for the decoder
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
    rates,  # (G, 3) fp32
    group_rows,  # rows of one group, a multiple of ROWS where there are several
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
    rates += 3 * (program * ROWS // group_rows)
    cols = tl.arange(0, BD)
    bias_term = tl.zeros((BD,), tl.float32)
    for latent in range(program * ROWS, tl.minimum((program + 1) * ROWS, d_sae)):
        is_due = True
        if LAZY:
            is_due = tl.load(offsets + latent) < tl.load(offsets + latent + 1)
            if slots is not None:
                is_due |= tl.load(slots + latent) >= 0
        if is_due:
            grad, bias_grad = _gradient_row(
                latent, order, tokens, offsets, pair_weights, rows, tile_rows, tile_weights, dense,
                dense_bias, cols, d, TILE, BP, BD,
            )  # fmt: skip
            pairs_bias = bias_grad
            if slots is not None:
                slot = tl.load(slots + latent)
                grad, bias_grad = _more_of_row(slot, grad, bias_grad, more, more_bias, cols, d)
            old = _update_row(
                latent, cols, d, grad, weight, shadow, m, v, m_scale, v_scale, rates, step,
                beta1, beta2, eps, UNIT,
            )  # fmt: skip
            if bias is not None:
                bias_term += pairs_bias * old
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
    more: RowGradients | None = None,
    ends: Sequence[int] = (),
) -> Tensor:
    """Update `dictionary` in place; return Σ_l G_b[l] · W_enc[l] by the old rows, float32: (d_in),
    or (G, d_in) with G groups.

    Either `segments`, `code` and the two rows, or `gradients`. With several `ends`, grad_rows
    (n · P, d_out) are those of each token's prefixes.
    """
    d_sae, d_in = dictionary.W_enc.shape
    n_groups = scalars.rates.numel() // 3
    bias_terms = dictionary.W_enc.new_empty((cdiv(d_sae, ROWS), d_in))
    bias = dictionary.b_enc, dictionary.b_enc_m, dictionary.b_enc_v, bias_terms
    if segments is not None and code is not None:
        of_prefixes = _rows_of_prefixes(segments, ends)
        dec_from = *_pairs(of_prefixes, code.values, grad_rows), None, None
        enc_from = *_pairs(segments, code.grad_pre_acts, input_rows), None, None
    else:
        assert gradients is not None
        dec_from = *(None,) * 7, gradients.W_dec, None
        enc_from = *(None,) * 7, gradients.W_enc, gradients.b_enc
    dec_more = enc_more = None, None, None
    if more is not None:
        slots = _slots(more.latents, d_sae)
        extra = [part.float().contiguous() for part in more[1:]]
        dec_more, enc_more = (slots, extra[1], None), (slots, extra[0], extra[2])
    dec_state = dictionary.W_dec, dictionary.dec_shadow, dictionary.dec_moments
    enc_state = dictionary.W_enc, dictionary.enc_shadow, dictionary.enc_moments
    for source, (weight, shadow, moments), biases, is_unit in (
        ((*dec_from, *dec_more), dec_state, None, unit_norm),
        ((*enc_from, *enc_more), enc_state, bias, False),
    ):
        num_warps = _warps(weight.shape[1], moments)
        launch(
            _update_kernel,
            (bias_terms.shape[0],),
            *(*source, weight, shadow, *moments, *(biases or (None,) * 4)),
            *(scalars.rates, d_sae // n_groups),
            *(scalars.step, scalars.beta1, scalars.beta2, scalars.eps),
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
    if scalars.rates.ndim == 1:
        return bias_terms.sum(0)
    return bias_terms.view(n_groups, -1, d_in).sum(1)


def _pairs(segments: Segments, weights: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
    """Return what sums a matrix's gradient from pairs, tiles of hubs summed already."""
    assert rows is not None
    flat = weights.reshape(-1)
    lists = segments.order, segments.tokens, segments.offsets
    return *lists, flat, rows, *launch_tile_sums(segments, flat, rows)


def _rows_of_prefixes(segments: Segments, ends: Sequence[int]) -> Segments:
    """Return `segments` with each pair's row among the (n · P) of the prefixes in place of its
    token: the row of its token and of the first prefix that holds its latent."""
    if len(ends) < 2:
        return segments
    rows = segments.tokens * len(ends)
    for end in ends[:-1]:  # a comparison each: a GPU would wait for a tensor of the ends
        rows = rows + (segments.latents >= end)
    return segments._replace(tokens=rows)


def _slots(latents: Tensor, d_sae: int) -> Tensor:
    """Return each latent's position in `latents`, −1 where it is not; of d_sae + 1, for padding."""
    slots = latents.new_full((d_sae + 1,), -1)
    at = torch.arange(latents.numel(), device=latents.device)
    return slots.scatter_(0, latents.clamp(max=d_sae), at)


def _warps(d: int, moments: Moments) -> int:
    """Return warps for rows of `d`: 16 elements a thread, 8 where more than they need registers.

    Rounding does, and so do rows off a multiple of 16 bytes: each element has an address.
    """
    is_plain = moments.m.dtype == torch.float32 and d % 16 == 0
    return min(16, max(1, next_power_of_2(d) // (512 if is_plain else 256)))


# ---- the torch form: gradients as matrices, then the same arithmetic


def sparse_gradients(
    code: Code,
    grad_x_hat: Tensor,
    x: Tensor,
    d_sae: int,
    *,
    prefixes: Sequence[int] | None = None,
    impl: Impl = "auto",
) -> Gradients:
    """Return the weight gradients of a code as tensors, float32, with one sort for all three.

    grad_x_hat (n, d_out), or (n, P, d_out) with `prefixes`, and x (n, d_in) as in `fused_update_`.
    For clipping, and for averaging over processes before `dense_update_`.
    """
    ends, grad_rows = _ends(prefixes, d_sae), grad_x_hat.reshape(-1, grad_x_hat.shape[-1])
    form = choose_form(impl, "sparse_gradients", code.values, code.grad_pre_acts, grad_x_hat, x)
    segments = by_latent(code.indices, d_sae, code.offsets)
    if form == "triton":
        of_prefixes = _rows_of_prefixes(segments, ends)
        grad_rows = grad_rows.contiguous()
        dec, _ = launch_segment_sums(of_prefixes, code.values, grad_rows, torch.float32)
        enc, bias = launch_segment_sums(segments, code.grad_pre_acts, x, torch.float32)
        return Gradients(enc, dec, bias)
    return _gradients_by_block(segments, code, grad_rows, x, ends)(0, d_sae)


def _gradients_by_block(
    segments: Segments, code: Code, grad_rows: Tensor, x: Tensor, ends: Sequence[int]
) -> Callable[[int, int], Gradients]:
    """Return a function that gives the gradients of the latents in [start, stop), float32."""
    of_prefixes = _rows_of_prefixes(segments, ends)
    # embedding_bag on a CPU sums in the dtype of its rows.
    grad_rows, x = grad_rows.float().contiguous(), x.float().contiguous()
    values, grad_pre_acts = (
        part.reshape(-1)[segments.order].float() for part in (code.values, code.grad_pre_acts)
    )

    def gradients_of(start: int, stop: int) -> Gradients:
        encoder, pairs = of_latents(segments, start, stop)
        decoder, _ = of_latents(of_prefixes, start, stop)
        return Gradients(
            sorted_row_sums(encoder, grad_pre_acts[pairs], x),
            sorted_row_sums(decoder, values[pairs], grad_rows),
            sorted_sums(encoder, grad_pre_acts[pairs]),
        )

    return gradients_of


# What a block's gradient takes on a CPU: it stays in cache until the update has read it.
BLOCK_BYTES = 2 * 2**20


def _update_by_torch(
    dictionary: Dictionary,
    scalars: AdamScalars,
    gradients_of: Callable[[int, int], Gradients],
    unit_norm: bool,
    due: Tensor | None,
    more: RowGradients | None,
) -> Tensor:
    """As `launch_update`, block by block of rows on a CPU, no block of two groups.

    `gradients_of` (start, stop) returns those of some rows, which may be written over; `due`
    (d_sae,) bool are the latents to update, None for all.
    """
    d_sae = dictionary.W_enc.shape[0]
    all_rates = scalars.rates.view(-1, 3)
    bias_terms = dictionary.W_enc.new_zeros((len(all_rates), dictionary.W_enc.shape[1]))
    for group, start, stop in _blocks(dictionary, len(all_rates)):
        rows, scalars_now = slice(start, stop), scalars._replace(rates=all_rates[group])
        part, gradients = _rows_of(dictionary, rows), gradients_of(start, stop)
        bias_terms[group] += gradients.b_enc @ part.W_enc
        if more is not None:
            _add_(gradients, more, start, stop, d_sae)
        if unit_norm:
            along = torch.linalg.vecdot(gradients.W_dec, part.W_dec)
            gradients.W_dec.addcmul_(along[:, None], part.W_dec, value=-1)
        is_due = None if due is None else due[rows]
        bias_moments = Moments(part.b_enc_m, part.b_enc_v, *part.enc_moments[2:])
        options = {"due": is_due, "row": start}
        adam_step_(part.W_enc, gradients.W_enc, part.enc_moments, scalars_now, **options)
        adam_step_(part.W_dec, gradients.W_dec, part.dec_moments, scalars_now, **options)
        adam_step_(part.b_enc, gradients.b_enc, bias_moments, scalars_now, due=is_due)
        if unit_norm:
            norms = torch.linalg.vector_norm(part.W_dec, dim=1, keepdim=True).clamp_min_(1e-12)
            part.W_dec.div_(norms if is_due is None else norms.where(is_due[:, None], 1))
        for shadow, weight in ((part.enc_shadow, part.W_enc), (part.dec_shadow, part.W_dec)):
            if shadow is not None:
                shadow.copy_(weight)
    return bias_terms[0] if scalars.rates.ndim == 1 else bias_terms


def _blocks(dictionary: Dictionary, n_groups: int) -> Iterator[tuple[int, int, int]]:
    """Yield (group, start, stop) of blocks of rows; one block of each group on a GPU."""
    d_sae, d_in = dictionary.W_enc.shape
    width = most = d_sae // n_groups
    if dictionary.W_enc.is_cpu:
        most = max(1, BLOCK_BYTES // (4 * max(d_in, dictionary.W_dec.shape[1])))
    for group in range(n_groups):
        end = (group + 1) * width
        for start in range(group * width, end, most):
            yield group, start, min(start + most, end)


def _rows_of(dictionary: Dictionary, rows: slice) -> Dictionary:
    """Return views of some rows of all tensors of `dictionary`."""
    W_enc, W_dec, b_enc, *moments = dictionary[:5]
    enc_moments, dec_moments = (Moments(*(part[rows] for part in kept)) for kept in moments)
    shadows = dictionary.enc_shadow, dictionary.dec_shadow
    return Dictionary(
        *(W_enc[rows], W_dec[rows], b_enc[rows], enc_moments, dec_moments),
        *(dictionary.b_enc_m[rows], dictionary.b_enc_v[rows]),
        *(None if shadow is None else shadow[rows] for shadow in shadows),
    )


def _add_(gradients: Gradients, more: RowGradients, start: int, stop: int, d_sae: int) -> None:
    """Add those of `more` that lie in [start, stop) to a block's gradients."""
    latents, *rows = more
    if (start, stop) == (0, d_sae):
        latents = latents.clamp(max=d_sae - 1)  # padding adds zeros somewhere
    else:
        inside = (latents >= start) & (latents < stop)
        latents, rows = latents[inside] - start, [row[inside] for row in rows]
    for total, row in zip(gradients, rows, strict=True):
        total.index_add_(0, latents, row.to(total.dtype))


def adam_step_(
    weight: Tensor,
    grad: Tensor,
    moments: Moments,
    scalars: AdamScalars,
    *,
    due: Tensor | None = None,
    row: int = 0,
) -> None:
    """Take one Adam step with `weight`, whose rows are those from `row` on of a matrix.

    weight and grad (rows, d) float32, or (rows,) with float32 moments; grad stays as it is. `due`
    (rows,) bool are the rows to update, None for all. Nothing here waits for a GPU.
    """
    if due is None and weight.is_cpu and moments.m.dtype == torch.float32:
        _torch_adam_(weight, grad, moments, scalars)
        return
    lr, correction1, correction2 = scalars.rates.unbind()
    m, v = read_moments(moments)
    m = scalars.beta1 * m + (1 - scalars.beta1) * grad
    v = scalars.beta2 * v + (1 - scalars.beta2) * grad * grad
    change = lr / correction1 * m / (v.sqrt() / correction2.sqrt() + scalars.eps)
    before = [tensor.clone() for tensor in moments] if due is not None else []
    write_moments_(moments, m, v, scalars.step, row)
    if due is not None:
        change = change.where(due.view(-1, *[1] * (change.ndim - 1)), 0)
        for tensor, old in zip(moments, before, strict=True):
            tensor.copy_(tensor.where(due.view(-1, *[1] * (tensor.ndim - 1)), old))
    weight.sub_(change)


def _torch_adam_(weight: Tensor, grad: Tensor, moments: Moments, scalars: AdamScalars) -> None:
    """Take the step by torch's fused Adam: one pass, and its tensors are already on the host."""
    adam(
        *([weight], [grad], [moments.m], [moments.v], []),
        [scalars.step.float() - 1],
        fused=True,
        amsgrad=False,
        beta1=scalars.beta1,
        beta2=scalars.beta2,
        lr=scalars.rates[0].item(),
        weight_decay=0.0,
        eps=scalars.eps,
        maximize=False,
    )


# ---- the public ops


def fused_update_(
    dictionary: Dictionary,
    scalars: AdamScalars,
    code: Code,
    grad_x_hat: Tensor,
    x: Tensor,
    *,
    more: RowGradients | None = None,
    prefixes: Sequence[int] | None = None,
    unit_norm: bool = True,
    lazy: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Take one Adam step with W_enc, W_dec and b_enc in place, from a code and its gradients.

    grad_x_hat (n, d_out) is dL/dx_hat, x (n, d_in) what the encoder multiplied, and
    `code.grad_pre_acts` dL/dpre_acts of each pair: 0 where the activation function stopped it.
    `more` are gradients of single rows besides, of any floating dtype. With P `prefixes`
    (Matryoshka's, ascending, the last d_sae) grad_x_hat is (n, P, d_out): what reaches latents that
    are in prefix p and in none before it. `unit_norm` projects W_dec's gradient and renormalises
    its rows; `lazy` skips latents without gradients. No gradient of a weight's size exists, on a
    CPU one of a block of rows.

    Returns the encoder's part of dL/db_dec, −Σ_l G_b[l] · W_enc[l] (d_in) by the rows before the
    step and without `more`, for an encoder that reads x = input − b_dec. The decoder's part is
    grad_x_hat.sum(0). Where `scalars` are of G dictionaries, the rows are theirs, one behind the
    other, and what is returned is each one's, (G, d_in).

    Raises ValueError or TypeError for shapes, dtypes, devices or prefixes that do not fit.
    """
    _check_dictionary(dictionary)
    _check_groups(dictionary, scalars)
    check_code("code.values", code.values, code.indices, code.offsets)
    check_code("code.grad_pre_acts", code.grad_pre_acts, code.indices, code.offsets)
    n = code.indices.shape[0] if code.offsets is None else code.offsets.numel() - 1
    d_sae = dictionary.W_enc.shape[0]
    ends = _ends(prefixes, d_sae)
    middle = {"prefixes": len(ends)} if ends else {}
    check_shape("grad_x_hat", grad_x_hat, {"n": n, **middle, "d_out": dictionary.W_dec.shape[1]})
    check_shape("x", x, {"n": n, "d_in": dictionary.W_enc.shape[1]})
    check_same_device(W_enc=dictionary.W_enc, values=code.values, grad_x_hat=grad_x_hat, x=x)
    _check_more(more, dictionary)
    form = choose_form(
        impl, "fused_update_", code.values, code.grad_pre_acts, grad_x_hat, x, dictionary.W_enc
    )
    segments = by_latent(code.indices, d_sae, code.offsets)
    rows = grad_x_hat.reshape(-1, grad_x_hat.shape[-1]).contiguous(), x.contiguous()
    if form == "triton" and _fits(dictionary):
        given = segments, code, *rows, None, unit_norm, lazy, more, ends
        return -launch_update(dictionary, scalars, *given)
    due = None
    if lazy:
        due = segments.offsets[1:] > segments.offsets[:-1]
        if more is not None:
            due |= _slots(more.latents, d_sae)[:-1] >= 0
    gradients_of = _gradients_by_block(segments, code, *rows, ends)
    return -_update_by_torch(dictionary, scalars, gradients_of, unit_norm, due, more)


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
    _check_groups(dictionary, scalars)
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

    def gradients_of(start: int, stop: int) -> Gradients:
        return Gradients(*(part[start:stop].to(torch.float32, copy=True) for part in gradients))

    return -_update_by_torch(dictionary, scalars, gradients_of, unit_norm, None, None)


def _ends(prefixes: Sequence[int] | None, d_sae: int) -> tuple[int, ...]:
    """Return the prefixes' ends, () without; raise ValueError unless they ascend to `d_sae`."""
    if prefixes is None:
        return ()
    ends = tuple(int(end) for end in prefixes)
    if not ends or ends[0] < 1 or ends[-1] != d_sae or list(ends) != sorted(set(ends)):
        raise ValueError(
            f"`prefixes` must ascend from at least 1 to d_sae={d_sae}; got {list(ends)}. Pass "
            "those of the loss, or leave it out where grad_x_hat has two axes."
        )
    return ends


def _check_more(more: RowGradients | None, dictionary: Dictionary) -> None:
    if more is None:
        return
    check_shape("more.latents", more.latents, {"m": None})
    if more.latents.dtype != torch.int64:
        raise TypeError(
            f"`more.latents` must be torch.int64; got {more.latents.dtype}. Convert it with "
            "`.long()`."
        )
    m = more.latents.shape[0]
    check_shape("more.W_enc", more.W_enc, {"m": m, "d_in": dictionary.W_enc.shape[1]})
    check_shape("more.W_dec", more.W_dec, {"m": m, "d_out": dictionary.W_dec.shape[1]})
    check_shape("more.b_enc", more.b_enc, {"m": m})
    check_same_device(dictionary=dictionary.W_enc, **more._asdict())


def _fits(dictionary: Dictionary) -> bool:
    """Return whether a program can hold the rows; wider ones take the torch form."""
    return max(dictionary.W_enc.shape[1], dictionary.W_dec.shape[1]) <= WIDEST_ROW


def _check_groups(dictionary: Dictionary, scalars: AdamScalars) -> None:
    """Raise unless the rows divide into the groups that `scalars` has rates for."""
    d_sae, shape = dictionary.W_enc.shape[0], tuple(scalars.rates.shape)
    n_groups = shape[0] if len(shape) == 2 else 1
    if shape[-1:] != (3,) or len(shape) > 2 or d_sae % (n_groups * (ROWS if n_groups > 1 else 1)):
        raise ValueError(
            "`scalars.rates` must be (3,), or (G, 3) with G dictionaries of a multiple of "
            f"{ROWS} rows each; got {shape} for {d_sae} rows. Make it with `adam_scalars`."
        )


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
