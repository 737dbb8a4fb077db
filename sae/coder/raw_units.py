"""From a coder that was trained in normalised units to one that works on raw activations.

What a coder is trained on is x = f(x_raw); the coders returned here give the code of f(x_raw), and
reconstruct x_raw. `stream.normalisation` says which f a run has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.coder import SparseCoder

# Weights pass through float64, this many rows at a time.
ROWS_AT_ONCE = 4096
# What grows with the activations where decoder rows stay unit vectors.
IN_ACTIVATION_UNITS = ("b_enc", "b_dec", "threshold", "first_threshold", "b_mag")


@torch.no_grad()
def to_raw_units(coder: SparseCoder, scale: float) -> SparseCoder:
    """Return a copy of `coder`, trained on scale · x, that works on x.

    All activation functions here satisfy act(s·h) = s·act(h), thresholds scaled too, so dividing
    biases and thresholds by the scale makes the code s times smaller and leaves both weight
    matrices, and the unit decoder rows, as they are.
    """
    raw = _copy(coder)
    for name in IN_ACTIVATION_UNITS:
        if (tensor := getattr(raw, name, None)) is not None:
            tensor.div_(scale)
    return raw


@torch.no_grad()
def fold_affine(
    coder: SparseCoder, shift: Tensor | None, factor: Tensor, inverse: Tensor
) -> SparseCoder:
    """Return a copy of `coder`, trained on (x − shift) A, that works on x.

    W_enc ← W_enc A,   W_dec ← W_dec A⁻¹,   b_dec ← b_dec A⁻¹ + shift

    Pre-activations, and with them the code, are those of training, whatever the activation
    function, if encoder and decoder are two matrices. Decoder rows are what a latent writes in raw
    units: no longer of norm 1. Of several places A has a block each.

    Args:
        shift: (width) of a row of all places; None: 0. factor: A, symmetric (width, width), or its
            diagonal (width). inverse: A⁻¹, like factor.
    """
    raw, sites = _copy(coder), coder.sites
    shift = torch.zeros(sites.width) if shift is None else shift
    given = shift, factor, inverse
    if not coder.writes_what_it_reads:
        return _fold_apart(_copy(coder), raw, *(part.to("cpu", torch.float64) for part in given))
    shift, factor, inverse = (part.to(coder.W_enc.device, torch.float64) for part in given)
    b_dec = coder.b_dec.double()
    raw.W_enc.copy_(_times(coder.W_enc, factor))
    raw.W_dec.copy_(_times(coder.W_dec, inverse))
    raw.b_dec.copy_(_times(b_dec[None], inverse)[0] + shift)
    # Where the shift is large, b_dec's rounding is too: the pre-activations take it out again.
    moved = raw.b_dec.double() - shift.cpu()
    before, after = (
        torch.cat([rows.double() @ bias for rows in weight.split(ROWS_AT_ONCE)]).cpu()
        for weight, bias in ((coder.W_enc, b_dec), (raw.W_enc, moved))
    )
    raw.b_enc.copy_(coder.b_enc.double().cpu() - before + after)
    if coder.cfg.activation == "gated":  # its magnitudes are exp(r_mag) times the same products
        moved_too = coder.r_mag.double().cpu().exp() * (after - before)
        raw.b_mag.copy_(coder.b_mag.double().cpu() + moved_too)
    return raw


def _fold_apart(
    coder: SparseCoder, raw: SparseCoder, shift: Tensor, factor: Tensor, inverse: Tensor
) -> SparseCoder:
    """Fill `raw` where other places are written than are read: b_dec is of these alone. All is in
    CPU memory.

    b_enc ← b_enc − shift_in W_encᵀ;  W_skip ← A_out⁻¹ W_skip A_in, its share of the shift in b_dec.
    """
    sites = coder.sites
    before, after = sites.read_columns, sites.written_columns
    factor_in, inverse_out = _block(factor, before), _block(inverse, after)
    raw.b_dec.copy_(_times(coder.b_dec[None].double(), inverse_out)[0] + shift[after])
    if coder.n_layers is None:
        raw.W_enc.copy_(_times(coder.W_enc, factor_in))
        moved = raw.W_enc.double() @ shift[before]
    else:
        parts, ends, moves = coder.W_enc.chunk(coder.n_layers), sites.columns(), []
        for rows, part, columns in zip(parts, raw.W_enc.chunk(coder.n_layers), ends, strict=False):
            part.copy_(_times(rows, _block(factor, columns)))
            moves.append(part.double() @ shift[columns])
        moved = torch.cat(moves)
    raw.b_enc.copy_(coder.b_enc.double() - moved)
    if coder.cfg.activation == "gated":
        raw.b_mag.copy_(coder.b_mag.double() - coder.r_mag.double().exp() * moved)
    # One decoder for all layers: their factors are then one number.
    of_rows = _block(inverse, sites.columns()[len(sites.reads)]) if coder.cfg.tie_decoders else None
    raw.W_dec.copy_(_times(coder.W_dec, inverse_out if of_rows is None else of_rows))
    if coder.W_skip is not None:
        assert raw.W_skip is not None
        skip = _times(_times(coder.W_skip.double(), factor_in).T, inverse_out).T
        raw.W_skip.copy_(skip)
        raw.b_dec.sub_(skip @ shift[before])
    return raw


@torch.no_grad()
def rescale_code_(coder: SparseCoder, factor: float) -> SparseCoder:
    """Make the code `factor` times as large and decoder rows as much smaller; x_hat stays."""
    for name in ("W_enc", "b_enc", "threshold", "first_threshold", "b_mag"):
        if (tensor := getattr(coder, name, None)) is not None:
            tensor.mul_(factor)
    coder.W_dec.div_(factor)
    return coder


def with_layer_norm(coder: SparseCoder) -> SparseCoder:
    """Return a copy of `coder`, trained on layer-normed tokens, that norms them itself.

    A token's own mean and deviation cannot be folded into weights.
    """
    raw = _copy(coder)
    raw.has_layer_norm = True
    return raw


@torch.no_grad()
def _copy(coder: SparseCoder) -> SparseCoder:
    """Return a copy in CPU memory."""
    copied = SparseCoder(
        coder.d_in,
        coder.cfg,
        coder.metadata,
        has_layer_norm=coder.has_layer_norm,
        sites=coder.sites,
    )
    copied.load_state_dict(coder.state_dict())
    if copied.cfg.sparsity_loss == "quadratic":  # what steered the thresholds goes into them
        copied.threshold.copy_(copied.thresholds())
        copied.log_pressure.zero_()
    return copied


def _block(factor: Tensor, columns: slice) -> Tensor:
    """Return the part of A, or of its diagonal, that belongs to some columns."""
    return factor[columns] if factor.ndim == 1 else factor[columns, columns]


def _times(rows: Tensor, factor: Tensor) -> Tensor:
    """Return rows (n, d_in) · A, computed in float64, in their dtype."""
    parts = [
        (part.double() * factor if factor.ndim == 1 else part.double() @ factor).to(rows.dtype)
        for part in rows.split(ROWS_AT_ONCE)
    ]
    return torch.cat(parts)
