"""Probes of concepts, and what a change does to the one that it is meant for and to the others.

A probe w_c is class-balanced least squares: w_c = (Σ + ridge)⁻¹ (mean x with c − mean x without),
Σ the covariance, its threshold half way between the two means. With A_c' the balanced accuracy of
probe c', a change meant for concept c has
    gap_c = (A_c before − A_c after) − mean over c' ≠ c of (A_c' before − A_c' after)
and what is reported is the mean of gap_c.
Source: Karvonen et al. 2025, "SAEBench" (arXiv 2503.09532; targeted probe perturbation after Marks
et al. 2024); deviation: probes by least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.evals.blocks import N_BLOCKS

RIDGE = 1e-3


class Probes:
    """Probes of concepts, fitted on some rows.

    Shapes: x (n, d), is_on (n, concepts) bool; mean (d), difference (concepts, d), probes (d,
    concepts); on_less_off (n, concepts), whose product with values gives means with less without.
    """

    def __init__(self, x: Tensor, is_on: Tensor) -> None:
        on, off = (part.float() / part.sum(0) for part in (is_on, ~is_on))
        self.mean = x.mean(0)
        self.on_less_off = on - off
        self.difference = self.on_less_off.T @ x
        centred = x - self.mean
        covariance = centred.T @ centred / len(x)
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean().clamp_min(1e-12))
        self.probes = torch.linalg.solve(covariance, self.difference.T)
        middle = (on + off).T @ centred / 2
        self.thresholds = (middle.T * self.probes).sum(0)

    def scores(self, x: Tensor) -> Tensor:
        """Return the probes' scores (n, concepts); above 0 a probe says that its concept is on."""
        return (x - self.mean) @ self.probes - self.thresholds

    def along(self, directions: Tensor, x: Tensor) -> Tensor:
        """Return what projecting each of directions (concepts, d) out of x takes from the scores.

        Shapes: (concepts, n, concepts).
        """
        unit = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
        along = (x - self.mean) @ unit.T
        return along.T[:, :, None] * (unit @ self.probes)[:, None, :]


class Hits:
    """Balanced accuracies of probes by weighted blocks of rows.

    Shapes: scores, is_on (n, concepts); blocks (n) int64 below N_BLOCKS.
    """

    def __init__(self, scores: Tensor, is_on: Tensor, blocks: Tensor) -> None:
        self.scores, self.is_on, self.blocks = scores, is_on, blocks
        self.n_on, self.n_off = self._by_block(is_on), self._by_block(~is_on)

    def accuracy(self, weights: Tensor) -> Tensor:
        """Return the probes' mean accuracy for weights (r, blocks), (r)."""
        return self._accuracy(weights, self.scores).nanmean(1)

    def gaps(self, weights: Tensor, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean gap of each change, (r), from what it takes from the scores.

        A concept counts in the resamples that hold rows of it and others.

        Shapes: changes (concepts, n, concepts) each.
        """
        before = self._accuracy(weights, self.scores)
        found = {}
        for name, change in changes.items():
            gaps = []
            for concept, subtracted in enumerate(change):
                effect = before - self._accuracy(weights, self.scores - subtracted)
                others = effect[:, torch.arange(effect.shape[1]) != concept]
                gaps.append(effect[:, concept] - others.nanmean(1))
            found[name] = torch.stack(gaps, 1).nanmean(1)
        return found

    def _accuracy(self, weights: Tensor, scores: Tensor) -> Tensor:
        """Return each probe's balanced accuracy, (r, probes)."""
        says = scores > 0
        right_on = weights @ self._by_block(says & self.is_on) / (weights @ self.n_on)
        right_off = weights @ self._by_block(~says & ~self.is_on) / (weights @ self.n_off)
        return (right_on + right_off) / 2

    def _by_block(self, counted: Tensor) -> Tensor:
        sums = torch.zeros(N_BLOCKS, counted.shape[1], dtype=torch.float64)
        return sums.index_add_(0, self.blocks, counted.double())
