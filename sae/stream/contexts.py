"""The two records that flow through the stream: tokens, and tokens with their activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Contexts:
    """A batch of token sequences.

    Shapes: tokens (b, t) int64; document_ids (b, t) int64, the index of the document that a token
    came from (BOS tokens belong to the document that follows); is_kept (b, t) bool, False where
    `data.mask` leaves a token out of training and evaluation.
    """

    tokens: Tensor
    document_ids: Tensor
    is_kept: Tensor


@dataclass(frozen=True)
class CapturedContexts(Contexts):
    """Contexts with the model's activations, (b, t, d), in raw units; of several places side
    by side."""

    activations: Tensor
