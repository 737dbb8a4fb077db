"""Sparse probing of whole texts: do single latents tell what a text is about, by its last token?

The concepts are the labelled data sets of sae-probes that `eval.probe_texts` names (`labelled`). A
text's row is the activation at its last token, as there; of a long text the model reads the last
`eval.probe_context_tokens`. Metrics: `scores`; what a probe is: `probes`.

Source: Kantamneni et al. 2025 (arXiv 2502.16681). Deviations: few rows a task
(`eval.probe_examples`, there 1024 to train), so that ceilings are lower; shorter texts.
Cost: examples · data sets texts through the model, minutes on a CPU; then about a quarter of a
second a data set. Cannot see: what a latent writes; what latents do before a text's end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.interface import EvalSetup, Explanation, Seen, Value
from sae.evals.probing.labelled import LabelledTexts
from sae.evals.probing.reading import LabelledBatch
from sae.evals.probing.scores import Probed, labels_of

PREFIX = "text_probe"
LABELS = labels_of(PREFIX, "classes of texts")


class ProbingTexts:
    """Accumulates what `LABELS` lists.

    Errors: RuntimeError where sae-probes is not installed.
    """

    def __init__(self, setup: EvalSetup) -> None:
        self.seen, self.texts = Seen(), LabelledTexts(setup.settings, setup.seed)
        self.probed = Probed(setup, PREFIX, self.texts.names, "texts: {}")

    def update(self, batch: LabelledBatch) -> None:
        """Add texts of one data set."""
        self.seen.update(batch.numbers)
        self.seen.n_tokens += batch.n_tokens - len(batch.numbers)
        is_known = torch.zeros(len(batch.numbers), len(self.texts.names), dtype=torch.bool)
        is_known[:, batch.task] = True
        self.probed.changed().update(
            batch.numbers,
            batch.halves,
            batch.is_on[:, None],
            is_known,
            batch.x.cpu(),
            Latents(*(part.cpu() for part in batch.latents)),
        )

    def merge(self, other: ProbingTexts) -> None:
        """Add another's texts."""
        self.seen.merge(other.seen)
        self.probed.changed().merge(other.probed.sample)

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module, with intervals over data sets."""
        return self.probed.metrics()

    def arrays(self) -> Mapping[str, Tensor]:
        """Return each data set's scores and latents, and each latent's best AUROC."""
        return self.probed.arrays()

    def explanations(self) -> list[Explanation]:
        """Return which data set each latent tells best."""
        return self.probed.explanations()
