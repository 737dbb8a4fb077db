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

import torch

from sae.coder.latents import Latents
from sae.evals.interface import EvalSetup, Seen
from sae.evals.probing.labelled import LabelledTexts
from sae.evals.probing.reading import LabelledBatch
from sae.evals.probing.scores import NO_TASK, Probing, labels_of
from sae.evals.probing.tasks import ConceptRows

PREFIX = "text_probe"
LABELS = labels_of(PREFIX, "classes of texts")


def probing_texts(setup: EvalSetup) -> Probing:
    """Start the eval of this module.

    Errors: RuntimeError where sae-probes is not installed.
    """
    return Probing(setup, DataSets(setup))


class DataSets:
    """Labelled texts, by the class that their data set says."""

    prefix, words, nothing = PREFIX, "texts: {}", NO_TASK

    def __init__(self, setup: EvalSetup) -> None:
        self.texts = LabelledTexts(setup.settings, setup.seed)
        self.names = self.texts.names

    def rows(self, batch: LabelledBatch, seen: Seen) -> ConceptRows:
        """Return a row a text, of the one concept that its data set is about."""
        seen.update(batch.numbers)
        seen.n_tokens += batch.n_tokens - len(batch.numbers)
        is_known = torch.zeros(len(batch.numbers), len(self.names), dtype=torch.bool)
        is_known[:, batch.task] = True
        latents = Latents(*(part.cpu() for part in batch.latents))
        is_on = batch.is_on[:, None]
        return ConceptRows(batch.numbers, batch.halves, is_on, is_known, batch.x.cpu(), latents)
