"""The ops' maths on a slice, in any dtype: in float64 it is the truth, in the inputs' dtype eager.

Written from the formulas, and apart from the package that is measured.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import Batch, Code

CHUNK_LATENTS = 2**16


def decode(code: Code, rows: Tensor, dtype: torch.dtype, below: int | None = None) -> Tensor:
    """Return x_hat of the tokens `rows` with the latents below `below` (all if None)."""
    values, indices = code.values[rows].to(dtype), code.indices[rows]
    if below is not None:
        values = values.where(indices < below, 0)
    return (values.unsqueeze(-1) * code.W_dec[indices].to(dtype)).sum(-2) + code.b_dec.to(dtype)


def row_dots(W: Tensor, indices: Tensor, vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ⟨W[indices[i, j]], vectors[i]⟩ as (n, k)."""
    return (W[indices].to(dtype) * vectors.to(dtype).unsqueeze(-2)).sum(-1)


def decode_loss(
    code: Code, rows: Tensor, dtype: torch.dtype, prefixes: Sequence[int] | None
) -> dict[str, Tensor]:
    """Return what `sparse_decode_loss` returns for the tokens `rows`, prefix by prefix."""
    indices, losses = code.indices[rows], []
    grad_values = torch.zeros(indices.shape, dtype=dtype, device=indices.device)
    residual = x_hat = code.target[rows].to(dtype)
    for end in prefixes or [code.W_dec.shape[0]]:
        x_hat = decode(code, rows, dtype, below=end)
        residual = code.target[rows].to(dtype) - x_hat
        losses.append(residual.square().sum(-1))
        dots = row_dots(code.W_dec, indices, residual, dtype)
        grad_values -= 2 * dots.where(indices < end, 0)
    prefix_losses = torch.stack(losses, -1)
    return {
        "loss": prefix_losses.sum(-1),
        "x_hat": x_hat,
        "residual": residual,
        "grad_values": grad_values,
        "prefix_losses": prefix_losses,
    }


def prefix_errors(code: Code, prefixes: Sequence[int] | None, dtype: torch.dtype) -> list[Tensor]:
    """Return x_hat − target (n, d) of all tokens for each prefix, 64 tokens at a time."""
    tokens = torch.arange(len(code.target), device=code.target.device).split(64)
    return [
        torch.cat([decode(code, t, dtype, end) - code.target[t].to(dtype) for t in tokens])
        for end in prefixes or [code.W_dec.shape[0]]
    ]


def pre_acts(batch: Batch, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the pre-activations (len(rows), d_sae), some latents at a time."""
    centred = batch.x[rows].to(dtype) - batch.b_dec.to(dtype)
    chunks = zip(batch.W_enc.split(CHUNK_LATENTS), batch.b_enc.split(CHUNK_LATENTS), strict=True)
    return torch.cat([torch.addmm(b.to(dtype), centred, W.to(dtype).T) for W, b in chunks], dim=1)


def b_dec_grad(W_enc: Tensor, bias_sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Return −bias_sums @ W_enc of bias_sums (d_sae,)."""
    chunks = zip(bias_sums.split(CHUNK_LATENTS), W_enc.split(CHUNK_LATENTS), strict=True)
    parts = [sums.to(dtype) @ W.to(dtype) for sums, W in chunks]
    return -torch.stack(parts).sum(0)
