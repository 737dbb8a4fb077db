"""Sparse probing on a world: do single latents tell its true features?

The concepts are the `eval.probe_features` features that fire most, at most d_sae of them; a row is
of a feature where its true code is not 0. Even rows train, odd ones test. Metrics: `scores`; what a
probe is: `probes`.

Source: as `probes`. Cost: a pass for the rows, memory `sample`; then about a quarter of a second a
concept. Cannot see: what a latent writes; sizes that are wrong in the same order, but in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.interface import EvalSetup, Explanation, Seen, Value
from sae.evals.numbers import HALVES, numbers_of
from sae.evals.probing.scores import Probed, labels_of
from sae.evals.truth import TruthBatch

PREFIX = "probe"
LABELS = labels_of(PREFIX, "true features")


class ProbingFeatures:
    """Accumulates what `LABELS` lists.

    Errors: ValueError for a setup without `truth`.
    """

    def __init__(self, setup: EvalSetup) -> None:
        self.seen, self.seed = Seen(), setup.seed
        truth = setup.require_truth("probing_features")
        self.features = truth.frequent[: setup.settings.probe_features]
        names = [f"feature_{number}" for number in self.features.tolist()]
        self.probed = Probed(setup, PREFIX, names, "{}")

    def update(self, batch: TruthBatch) -> None:
        """Add n rows."""
        numbers = batch.document_ids.cpu()
        self.seen.update(numbers)
        is_on = batch.codes[:, self.features.to(batch.codes.device)].cpu() > 0
        latents = Latents(*(part.cpu() for part in batch.latents))
        self.probed.changed().update(
            numbers_of(numbers, self.seed),
            numbers % HALVES,
            is_on,
            torch.ones_like(is_on),
            batch.x.cpu(),
            latents,
        )

    def merge(self, other: ProbingFeatures) -> None:
        """Add another's rows."""
        self.seen.merge(other.seen)
        self.probed.changed().merge(other.probed.sample)

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module, with intervals over features."""
        return self.probed.metrics()

    def arrays(self) -> Mapping[str, Tensor]:
        """Return each feature's scores and latents, and each latent's best AUROC."""
        return self.probed.arrays()

    def explanations(self) -> list[Explanation]:
        """Return which feature each latent tells best."""
        return self.probed.explanations()
