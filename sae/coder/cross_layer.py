"""Latents of many layers in one coder: each reads its own layer and writes to that and later ones.

With L layers of width d and F latents in all, latents [l F/L, (l + 1) F/L) belong to layer l:
    pre_acts of layer l = x_l W_enc_lᵀ + b_enc_l
    x_hat of layer m    = Σ_{l ≤ m} z_l W_dec_{l→m} + b_dec_m
W_enc: (F, d). W_dec: (F, L d), whose part before a latent's own layer is held at 0; with
`coder.tie_decoders` (F, d), W_dec_{l→m} being the same for all m.
Source: Ameisen et al. 2025, "Circuit Tracing", cross-layer transcoders; one code for all layers, so
that k is the number of active latents of a token over all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, n_layers: int) -> Tensor:
    """Return (n, F) from x (n, L d), each layer's latents from that layer alone."""
    layers = x.unflatten(1, (n_layers, -1)).transpose(0, 1)
    rows = W_enc.unflatten(0, (n_layers, -1)).transpose(1, 2)
    return torch.bmm(layers, rows).transpose(0, 1).flatten(1) + b_enc


def decode_tied(code: Tensor, W_dec: Tensor, n_layers: int) -> Tensor:
    """Return Σ_{l ≤ m} z_l W_dec_l for every layer m, (n, L d), from a dense code (n, F)."""
    layers = code.unflatten(1, (n_layers, -1)).transpose(0, 1)
    added = torch.bmm(layers, W_dec.unflatten(0, (n_layers, -1)))
    return added.cumsum(0).transpose(0, 1).flatten(1)


def norms_of_tied(W_dec: Tensor, n_layers: int) -> Tensor:
    """Return the norm of what a latent writes to every layer, (L, F): 0 before its own."""
    layers = torch.arange(n_layers, device=W_dec.device)
    own = layers.repeat_interleave(len(W_dec) // n_layers)
    return W_dec.norm(dim=1) * (layers[:, None] >= own)


@torch.no_grad()
def hold_(rows: Tensor, n_layers: int) -> None:
    """Set what latents would write to layers before their own to 0: rows (F, L d), in place."""
    n, d = len(rows) // n_layers, rows.shape[1] // n_layers
    for layer in range(1, n_layers):
        rows[layer * n : (layer + 1) * n, : layer * d] = 0
