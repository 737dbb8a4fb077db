"""Sparse probing on a world: do single latents tell its true features?

The concepts are the `eval.probe_features` features that fire most, at most d_sae of them; a row is
of a feature where its true code is not 0. Even rows train, odd ones test. Metrics: `scores`; what a
probe is: `probes`.

Source: as `probes`. Cost: a pass for the rows, memory `sample`; then about a quarter of a second a
concept. Cannot see: what a latent writes; sizes that are wrong in the same order, but in the loss.
"""

from __future__ import annotations

import torch

from sae.coder.latents import Latents
from sae.evals.interface import EvalSetup, Seen
from sae.evals.numbers import HALVES, numbers_of
from sae.evals.probing.scores import NO_TASK, Probing, labels_of
from sae.evals.probing.tasks import ConceptRows
from sae.evals.truth import TruthBatch

PREFIX = "probe"
LABELS = labels_of(PREFIX, "true features")


def probing_features(setup: EvalSetup) -> Probing:
    """Start the eval of this module.

    Errors: ValueError for a setup without `truth`.
    """
    return Probing(setup, TrueFeatures(setup))


class TrueFeatures:
    """A world's rows, by the features that are on."""

    prefix, words, nothing = PREFIX, "{}", NO_TASK

    def __init__(self, setup: EvalSetup) -> None:
        truth = setup.require_truth("probing_features")
        self.seed, self.features = setup.seed, truth.frequent[: setup.settings.probe_features]
        self.names = tuple(f"feature_{number}" for number in self.features.tolist())

    def rows(self, batch: TruthBatch, seen: Seen) -> ConceptRows:
        """Return all rows of a batch."""
        numbers = batch.document_ids.cpu()
        seen.update(numbers)
        is_on = batch.codes[:, self.features.to(batch.codes.device)].cpu() > 0
        return ConceptRows(
            numbers_of(numbers, self.seed),
            numbers % HALVES,
            is_on,
            torch.ones_like(is_on),
            batch.x.cpu(),
            Latents(*(part.cpu() for part in batch.latents)),
        )
