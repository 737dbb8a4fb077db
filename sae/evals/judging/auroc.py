"""AUROC of a judge's answers: how often a text that fires is put above one that does not.

    AUROC = P(s₊ > s₋) + ½ P(s₊ = s₋), over all pairs of one positive and one negative
An answer that is none counts as wrong: below every answer for a positive, above for a negative.
So a judge that only ever answers nonsense scores 0, one that says the same to all scores 0.5.
Source: Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sae.evals.judging.judge import Confidence


def auroc(positive: Sequence[Confidence], negative: Sequence[Confidence]) -> float:
    """Return the AUROC in [0, 1]; NaN where one side is empty."""
    if not positive or not negative:
        return math.nan
    return auroc_of(_as_numbers(positive, -math.inf), _as_numbers(negative, math.inf))


def auroc_of(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Return the AUROC of numbers (p) and (q), neither empty."""
    high, low = positive[:, None], negative[None, :]
    return float(((high > low).double() + 0.5 * (high == low).double()).mean())


def is_valid(answer: Confidence) -> bool:
    """Say whether an answer is a finite number."""
    return answer is not None and math.isfinite(answer)


def _as_numbers(answers: Sequence[Confidence], wrong: float) -> torch.Tensor:
    numbers = [wrong if answer is None or not is_valid(answer) else answer for answer in answers]
    return torch.tensor(numbers, dtype=torch.float64)
