"""The sparse form of a code: which latents are active, and how strongly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def from_dense(dense: Tensor) -> Latents:
    """Return the sparse form of `dense` (n, d_sae); k is the most that any token has active."""
    k = max(int((dense != 0).sum(-1).max()) if dense.numel() else 0, 1)
    indices = torch.topk(dense.abs(), k, dim=-1, sorted=False).indices
    return Latents(dense.gather(-1, indices), indices)
