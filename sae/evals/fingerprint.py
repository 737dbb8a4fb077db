"""Fingerprints: whether two results are of the same tokens, and of which dictionary.

A digest of what was evaluated is a sum over tokens, so that it merges, and does not depend on
batches, their order, or which process saw them:
    Σ mix(mix(document) + token + Σ_i bits(x_i) mix(i))  mod 2⁶⁴
Activations enter only where no language model gave them: one model's differ in their last bits with
the batch. mix: SplitMix64 (`numbers.mixed`). A chance collision is about 1 in 2⁶⁴; nothing
here withstands somebody who seeks one.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from sae.evals.numbers import mixed


class TokenDigest:
    """The digest of the tokens seen so far.

    Args:
        has_text: the tokens say which activations are meant, and these are not looked at.
    """

    def __init__(self, has_text: bool) -> None:
        self.has_text = has_text
        self._sum = torch.zeros((), dtype=torch.int64)

    def update(self, document_ids: Tensor, tokens: Tensor, x: Tensor) -> None:
        """Add tokens: document_ids and tokens (n) int64, x (n, d)."""
        numbers = mixed(document_ids) + tokens
        if not self.has_text:
            bits = x.float().contiguous().view(torch.int32).long()
            # A sum of products: a GPU has no matmul of integers.
            numbers = numbers + (bits * _weights(x.shape[1], x.device)).sum(-1)
        self._sum += mixed(numbers).sum().cpu()

    def merge(self, other: TokenDigest) -> None:
        """Add what `other` saw."""
        self._sum += other._sum

    def __str__(self) -> str:
        return f"{int(self._sum) % 2**64:016x}"


def _weights(d: int, device: torch.device) -> Tensor:
    return mixed(torch.arange(d, device=device))


def dictionary_digest(coder: Any) -> str | None:
    """Return a digest of all tensors of a dictionary and of its settings.

    None where the object shows no tensors: nothing then tells it from another.
    """
    is_module = isinstance(coder, nn.Module)
    named = coder.state_dict() if is_module else getattr(coder, "__dict__", {})
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        return None
    digest = hashlib.blake2b(repr(getattr(coder, "cfg", None)).encode(), digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
