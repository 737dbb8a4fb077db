"""Which learned direction is which true one: cosines, and the best one-to-one assignment.

With unit decoder rows D̂ (m, d_in) and unit true directions Ĝ (n, d_in), C = |D̂ Ĝᵀ| (m, n). A zero
row has cosine 0 with everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_NORM = 1e-8


def absolute_cosines(learned: Tensor, true: Tensor) -> Tensor:
    """Return C (m, n) float64 of learned (m, d_in) and true (n, d_in) directions, on the CPU."""
    return (_unit(learned) @ _unit(true).T).abs()


def assigned(scores: Tensor) -> Tensor:
    """Return the scores of the one-to-one pairs with the largest sum, (min(m, n))."""
    return scores[assignment(scores)]


def assignment(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the one-to-one pairs with the largest sum, (min(m, n)) each.

    Source: Kuhn 1955, "The Hungarian method for the assignment problem"; as the mean correlation
    coefficient of dictionaries in arXiv 2505.20254. Cost: O(min(m, n)² max(m, n)).
    """
    # Importing it takes a while, and only this needs it.
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def _unit(rows: Tensor) -> Tensor:
    rows = rows.detach().cpu().double()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
