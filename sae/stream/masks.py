"""Which tokens count: the mask of `data.mask`, and why each masked token is out.

A token's reason is the first that holds of: padding, bos, first, special. Ids are compared, never
taken as true or false: a BOS id of 0 is an id like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.config import MaskName
from sae.stream.contexts import Contexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING_DOCUMENT = -1
"""The document id of padding, which belongs to no document."""


@dataclass(frozen=True)
class TokenMask:
    """The rule that decides which tokens of a context are kept."""

    names: tuple[MaskName, ...]
    bos_id: int | None
    special_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, names: Sequence[MaskName]) -> TokenMask:
        """Make the rule for a tokenizer's special tokens."""
        bos_id: Any = tokenizer.bos_token_id
        others = sorted(set(tokenizer.all_special_ids) - {bos_id})
        return cls(tuple(names), bos_id, tuple(others))

    def is_kept(self, tokens: Tensor, document_ids: Tensor) -> Tensor:
        """Return (b, t) bool: which tokens of (b, t) contexts are kept."""
        masked = torch.stack(list(self._reasons(tokens, document_ids).values()))
        return ~masked.any(0)

    def shares(self, contexts: Contexts) -> dict[str, float]:
        """Return the share of all tokens left out for each reason; they add up to the masked."""
        explained = torch.zeros_like(contexts.tokens, dtype=torch.bool)
        shares = {}
        for name, mask in self._reasons(contexts.tokens, contexts.document_ids).items():
            shares[name] = (mask & ~explained).double().mean().item()
            explained |= mask
        return shares

    def _reasons(self, tokens: Tensor, document_ids: Tensor) -> dict[str, Tensor]:
        reasons = {"padding": document_ids == PADDING_DOCUMENT}
        if "bos" in self.names and self.bos_id is not None:
            reasons["bos"] = tokens == self.bos_id
        if "first" in self.names:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            reasons["first"] = (positions == 0).expand_as(tokens)
        if "special" in self.names:
            special_ids = torch.tensor(self.special_ids, dtype=tokens.dtype, device=tokens.device)
            reasons["special"] = torch.isin(tokens, special_ids)
        return reasons
