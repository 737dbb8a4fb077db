"""A dictionary of attention's output by heads: whose work a latent is.

Trained at the input of the output projection (`…self_attn.o_proj:in`), a coder reads the heads'
results side by side, head h in columns [h d_head, (h + 1) d_head). So a latent's pre-activation is
a sum over heads, and so is what it writes:
    pre_act_j = Σ_h ⟨x_h − b_dec_h, W_enc_jh⟩ + b_enc_j        W_dec_j = (W_dec_j1, …, W_dec_jH)
Source: Kissane et al. 2024 (arXiv 2406.17759), attention-output dictionaries: weight-based head
attribution (norms of decoder parts) and direct feature attribution by head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae.coder import SparseCoder


@torch.no_grad()
def head_shares(coder: SparseCoder, n_heads: int) -> Tensor:
    """Return each head's share of what latents write, (n_heads, d_sae), by norm; columns add to 1.

    Errors: ValueError where the coder's width is not that of `n_heads` equal heads.
    """
    parts = _by_head(coder, coder.W_dec, n_heads).norm(dim=-1)
    return (parts / parts.sum(1, keepdim=True).clamp_min(1e-30)).T


@torch.no_grad()
def head_contributions(
    coder: SparseCoder, x: Tensor, latents: Sequence[int], n_heads: int
) -> Tensor:
    """Return what each head adds to latents' pre-activations, (n, n_heads, m), for x (n, d_in).

    With b_enc, which is no head's, they add up to the pre-activations.

    Errors: ValueError as `head_shares`, and for latents that are not there.
    """
    wrong = [latent for latent in latents if not 0 <= latent < coder.d_sae]
    if wrong:
        raise ValueError(
            f"`latents` must be in [0, d_sae={coder.d_sae}); got {wrong[:5]}. Give lower numbers."
        )
    read = _by_head(coder, x - coder.b_dec, n_heads)
    rows = _by_head(coder, coder.W_enc[list(latents)], n_heads)
    return torch.einsum("nhd,mhd->nhm", read, rows)


def _by_head(coder: SparseCoder, rows: Tensor, n_heads: int) -> Tensor:
    """Return rows (n, d_in) as (n, n_heads, d_head)."""
    if coder.cfg.site != "sae" or coder.d_in % n_heads:
        raise ValueError(
            "views by head need an sae of heads side by side, whose d_in is a multiple of "
            f"`n_heads`; got d_in={coder.d_in}, n_heads={n_heads}, site {coder.cfg.site}. Train at "
            "the input of the attention's output projection, and give the model's "
            "num_attention_heads."
        )
    return rows.unflatten(1, (n_heads, -1))
