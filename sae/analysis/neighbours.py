"""Each latent's nearest latents: the largest cosines between decoder rows, in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbours:
    """Nearest latents. Shapes: latents (d_sae, n) int64, cosines (d_sae, n) descending."""

    latents: Tensor
    cosines: Tensor


@torch.no_grad()
def nearest_latents(W_dec: Tensor, *, n: int = 5, chunk: int = 1024) -> Neighbours:
    """Return each latent's `n` nearest others by decoder cosine. Memory: chunk · d_sae floats."""
    rows = W_dec.detach().float()
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    n = min(n, len(unit) - 1)
    cosines, latents = [], []
    for start in range(0, len(unit), chunk):
        block = unit[start : start + chunk] @ unit.T
        own = torch.arange(len(block), device=block.device)
        block[own, own + start] = -torch.inf
        best = block.topk(n, dim=1)
        cosines.append(best.values)
        latents.append(best.indices)
    return Neighbours(torch.cat(latents).cpu(), torch.cat(cosines).cpu())
