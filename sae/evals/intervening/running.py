"""Forwards in which the activation at one place is changed, several variants side by side.

The change is added to what the model has there, so that whatever the dictionary does not explain
(its error) stays; a change of 0 leaves the model as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.evals.replacing import Places, changed, logits_of
from sae.stream.language_model import LanguageModel

TOKENS_AT_ONCE = 2048


@torch.no_grad()
def log_probs_under(
    lm: LanguageModel, places: Places, tokens: Tensor, changes: Tensor, counted: Tensor
) -> Tensor:
    """Return log-probabilities at the `counted` tokens of each variant, float32 on the CPU.

    Shapes: tokens (b, t); changes (v, b · t, width); counted (c) places in b · t; returns
    (v, c, vocabulary).
    """
    b, t = tokens.shape
    n_at_once = max(TOKENS_AT_ONCE // (b * t), 1)
    parts = []
    for group in changes.split(n_at_once):
        repeated = tokens.repeat(len(group), 1)
        with changed(lm, places, [group.flatten(0, 1)]):
            logits = logits_of(lm, repeated).reshape(len(group), b * t, -1)
        parts.append(logits[:, counted.to(logits.device)].float().log_softmax(-1).cpu())
    return torch.cat(parts)


def divergence(clean: Tensor, other: Tensor) -> Tensor:
    """Return KL(clean ‖ other) by token, (…) from log-probabilities (…, vocabulary)."""
    return (clean.exp() * (clean - other)).sum(-1).clamp_min(0)
