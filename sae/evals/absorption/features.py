"""Absorption, splitting and hedging on a world, against its true features.

The concepts are the parents of the world's trees, with their children, and the N_OTHERS features
that fire most, for splitting. A concept's direction is the true one, x is taken less the world's
bias. Formulas: `concepts`. `ground_truth` has the recall of the one latent that lies nearest to a
parent; here latents are those that fire for it, wherever they point.

Even rows choose the main latents, odd ones score them. Memory: the first `N_ROWS` rows, their codes
and their concepts. Cost: some milliseconds a concept.
Cannot see: features without a parent or child that are missed; codes that are wrong in size alone,
as long as they do not reach 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.absorption.concepts import COLUMNS, Directions, Rows, judged
from sae.evals.absorption.scores import labels_of, metrics_of
from sae.evals.interface import EvalSetup, Seen, Undefined, Value
from sae.evals.probing.sample import padded
from sae.evals.truth import TruthBatch

N_ROWS, N_OTHERS = 16_384, 64
PREFIX = "absorption"
LABELS = labels_of(PREFIX, "parents")
CANNOT_SEE = ("permuted decoder", "noise fitting", "what is not in a hierarchy")


class AbsorptionFeatures:
    """Accumulates what `LABELS` lists.

    Errors: ValueError for a setup without `truth`.
    """

    def __init__(self, setup: EvalSetup) -> None:
        self.setup, self.seen = setup, Seen()
        self.truth = setup.require_truth("absorption_features")
        parents, children = self.truth.pairs.unbind(1)
        others = self.truth.frequent[:N_OTHERS]
        self.concepts = torch.cat([parents, others]).unique()
        self.children = children.unique()
        number = {int(f): i for i, f in enumerate(self.concepts)}
        child_number = {int(f): i for i, f in enumerate(self.children)}
        pairs = [(number[int(p)], child_number[int(c)]) for p, c in self.truth.pairs.tolist()]
        self.pairs = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        self._parts: list[tuple[Tensor, Latents, Tensor, Tensor, Tensor]] = []
        self._outcome: tuple[Tensor, list[list[int]]] | None = None

    def update(self, batch: TruthBatch) -> None:
        """Keep those of the batch's rows that are among the first."""
        numbers = batch.document_ids.cpu()
        is_in = numbers < N_ROWS
        self._outcome = None
        self.seen.update(numbers[is_in])
        is_on = batch.codes.cpu()[is_in] > 0
        x = batch.x.cpu()[is_in].double() - self.truth.bias.double()
        along = x @ self.truth.directions[self.concepts].double().T
        code = Latents(*(part.cpu()[is_in] for part in batch.latents))
        concepts, children = is_on[:, self.concepts], is_on[:, self.children]
        self._parts.append((numbers[is_in], code, concepts, children, along.float()))

    def merge(self, other: AbsorptionFeatures) -> None:
        """Add another's rows."""
        self._outcome = None
        self.seen.merge(other.seen)
        self._parts += other._parts

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module, with intervals over concepts."""
        if self.seen.n_tokens == 0:
            return dict.fromkeys(LABELS, Undefined("no row was evaluated"))
        table, _ = self._judged()
        has_children = torch.isin(torch.arange(len(table)), self.pairs[:, 0])
        return metrics_of(PREFIX, table, has_children, self.setup)

    def arrays(self) -> Mapping[str, Tensor]:
        """Return by concept its feature's number and its values, in the order of COLUMNS."""
        if self.seen.n_tokens == 0:
            return {}
        return {
            "features": self.concepts,
            **dict(zip(COLUMNS, self._judged()[0].T.contiguous(), strict=True)),
        }

    def _judged(self) -> tuple[Tensor, list[list[int]]]:
        if self._outcome is None:
            truth, coder = self.truth, self.setup.coder
            directions = Directions(
                truth.directions[self.concepts],
                truth.directions[self.children],
                truth.decoder.float(),
                None if coder is None else coder.encoder_rows(),
            )
            self._outcome = judged(self._rows(), self.pairs, directions)
        return self._outcome

    def _rows(self) -> Rows:
        """Return all rows in the order of their numbers."""
        width = max(part[1].values.shape[1] for part in self._parts)
        numbers = torch.cat([part[0] for part in self._parts])
        order = numbers.argsort(stable=True)
        values = torch.cat([padded(part[1].values, width) for part in self._parts])[order]
        indices = torch.cat([padded(part[1].indices, width) for part in self._parts])[order]
        is_on = torch.cat([part[2] for part in self._parts])[order]
        is_child = torch.cat([part[3] for part in self._parts])[order]
        along = torch.cat([part[4] for part in self._parts])[order]
        code = Latents(values, indices)
        return Rows(code, is_on, is_child, along, along > 0, numbers[order] % 2 == 0)
