"""The sparse forms of a code: which latents are active, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sae_kernels import Ragged


class Latents(NamedTuple):
    """A code with k slots a token; unused slots have value 0 and any valid index.

    Shapes: values (n, k) floating, indices (n, k) int64 in [0, d_sae).
    """

    values: Tensor
    indices: Tensor

    def to_dense(self, d_sae: int) -> Tensor:
        """Return the (n, d_sae) code."""
        dense = self.values.new_zeros(*self.values.shape[:-1], d_sae)
        return dense.scatter_add_(-1, self.indices, self.values)

    def l0(self) -> Tensor:
        """Return how many latents are active (≠ 0) for each token, (n)."""
        return (self.values != 0).sum(-1)


SparseCode = Latents | Ragged
# A number gathered costs about this many numbers multiplied.
DENSE_FROM = 100


def joined(codes: Sequence[Latents]) -> Latents:
    """Return codes of n_i tokens below each other, (Σ n_i, largest k)."""
    k = max(code.values.shape[1] for code in codes)
    padded = [[pad(part, (0, k - part.shape[1])) for part in code] for code in codes]
    return Latents(*(torch.cat(parts) for parts in zip(*padded, strict=True)))


def to_dense(code: SparseCode | Tensor, d_sae: int) -> Tensor:
    """Return the (n, d_sae) code of any form of it."""
    if isinstance(code, Ragged):
        n = code.offsets.numel() - 1
        pairs = torch.arange(code.values.numel(), device=code.values.device)
        # Padding, of value 0, may lie behind the last token's pairs: it adds nothing anywhere.
        tokens = torch.searchsorted(code.offsets[1:], pairs, right=True).clamp(max=max(n - 1, 0))
        flat = code.values.new_zeros(n * d_sae)
        return flat.scatter_add(0, tokens * d_sae + code.indices, code.values).reshape(n, d_sae)
    return code.to_dense(d_sae) if isinstance(code, Latents) else code


def from_dense(dense: Tensor) -> Latents:
    """Return the sparse form of `dense` (n, d_sae); k is the most that any token has active."""
    k = max(int((dense != 0).sum(-1).max()) if dense.numel() else 0, 1)
    indices = torch.topk(dense.abs(), k, dim=-1, sorted=False).indices
    return Latents(dense.gather(-1, indices), indices)


def dense_if_cheaper(code: SparseCode | Tensor, n: int, d_sae: int) -> SparseCode | Tensor:
    """Return the dense form of a code of n tokens where products with it cost less than gathers."""
    if isinstance(code, Tensor) or code.values.numel() * DENSE_FROM < n * d_sae:
        return code
    return to_dense(code, d_sae)


def strongest(code: Latents, k: int) -> Latents:
    """Return the k largest values in magnitude of each token of `code`."""
    slots = torch.topk(code.values.detach().abs(), k, dim=-1, sorted=False).indices
    return Latents(code.values.gather(-1, slots), code.indices.gather(-1, slots))
