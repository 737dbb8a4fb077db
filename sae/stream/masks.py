"""Which tokens count: those that `data.mask` and `data.exclude_tokens` leave, and why others don't.

A token's reason is the first that holds of: padding, bos, first, special, excluded. Ids are
compared, never taken as true or false: a BOS id of 0 is an id like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    excluded_ids: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[MaskName],
        excluded_ids: Sequence[int] = (),
    ) -> TokenMask:
        """Make the rule for a tokenizer's special tokens and for more ids."""
        bos_id: Any = tokenizer.bos_token_id
        others = sorted(set(tokenizer.all_special_ids) - {bos_id})
        return cls(tuple(names), bos_id, tuple(others), tuple(excluded_ids))

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
            reasons["special"] = _is_among(tokens, self.special_ids)
        if self.excluded_ids:
            reasons["excluded"] = _is_among(tokens, self.excluded_ids)
        return reasons


def find_token_ids(
    tokenizer: PreTrainedTokenizerBase, wanted: Sequence[int | str], vocabulary_size: int
) -> tuple[int, ...]:
    """Return the sorted ids of `data.exclude_tokens`.

    Raises ValueError where one is no id of the vocabulary, or no single token.
    """
    if not wanted:
        return ()
    vocabulary = tokenizer.get_vocab()
    ids = {
        _known_id(token, vocabulary_size)
        if isinstance(token, int)
        else _id_of_text(tokenizer, vocabulary, token)
        for token in wanted
    }
    return tuple(sorted(ids))


def _known_id(token_id: int, vocabulary_size: int) -> int:
    if not 0 <= token_id < vocabulary_size:
        raise ValueError(
            f"`data.exclude_tokens` must name tokens of the model, whose ids are in "
            f"[0, {vocabulary_size}); got the id {token_id}. Give another, or the token's text."
        )
    return token_id


def _id_of_text(tokenizer: Any, vocabulary: Mapping[str, int], text: str) -> int:
    """Return the id of a token as the vocabulary spells it ("Ġthe"), or as it reads (" the")."""
    if text in vocabulary:
        return vocabulary[text]
    ids = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    if len(ids) != 1:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"`data.exclude_tokens` must name single tokens of the tokenizer; {text!r} is "
            f"{len(ids)}: {pieces}. Name those of them that you mean, or give ids."
        )
    return ids[0]


def _is_among(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    return torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device))
