"""Sparse probing of tokens: do single latents tell concepts that rules can name?

The concepts are those of `sae.evals.concepts`: digits, capitals, quotations, languages, … Tokens
of one half of the documents train, of the other test. Metrics: `scores`; what a probe is: `probes`.

Source: as `probes`; the concepts are ours. Cost: a pass for the tokens, memory `sample`; then about
a quarter of a second a concept. Cannot see: what a latent writes; concepts that take understanding;
what a concept's tokens do outside the text that is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.concepts import CONCEPTS, concepts_of_contexts
from sae.evals.interface import ContextBatch, EvalSetup, Explanation, Seen, Value
from sae.evals.numbers import halves_of, token_numbers
from sae.evals.probing.scores import Probed, labels_of
from sae.stream.vocabulary import token_texts

PREFIX = "token_probe"
LABELS = labels_of(PREFIX, "concepts of tokens")
NO_TEXT = "the activations come from no language model, so that no token has a text"


class ProbingTokens:
    """Accumulates what `LABELS` lists."""

    def __init__(self, setup: EvalSetup) -> None:
        self.seen, self.seed = Seen(), setup.seed
        self.probed = Probed(setup, PREFIX, list(CONCEPTS), "tokens: {}")
        self._texts: dict[int, str] = {}
        self._has_text = False

    def update(self, batch: ContextBatch) -> None:
        """Add a batch of contexts; those without text are only counted."""
        contexts, kept = batch.contexts, batch.kept.cpu()
        documents = contexts.document_ids.cpu().flatten()[kept]
        self.seen.update(documents)
        if batch.lm is None:
            return
        self._has_text = True
        self._read(batch)
        tokens, ids = contexts.tokens.cpu(), contexts.document_ids.cpu()
        is_on = concepts_of_contexts(tokens, ids, self._texts).flatten(0, 1)[kept]
        self.probed.changed().update(
            token_numbers(contexts, kept, self.seed),
            halves_of(documents, self.seed),
            is_on,
            torch.ones_like(is_on),
            contexts.activations.flatten(0, 1)[kept.to(contexts.activations.device)].cpu(),
            Latents(*(part.cpu() for part in batch.latents)),
        )

    def merge(self, other: ProbingTokens) -> None:
        """Add another's tokens."""
        self.seen.merge(other.seen)
        self._has_text |= other._has_text
        self.probed.changed().merge(other.probed.sample)

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module, with intervals over concepts."""
        return self.probed.metrics() if self._has_text else self.probed.undefined(NO_TEXT)

    def arrays(self) -> Mapping[str, Tensor]:
        """Return each concept's scores and latents, and each latent's best AUROC."""
        return self.probed.arrays() if self._has_text else {}

    def explanations(self) -> list[Explanation]:
        """Return which concept each latent tells best."""
        return self.probed.explanations() if self._has_text else []

    def _read(self, batch: ContextBatch) -> None:
        """Look up the text of tokens that are new."""
        assert batch.lm is not None
        new = [i for i in batch.contexts.tokens.unique().tolist() if i not in self._texts]
        self._texts |= zip(new, token_texts(batch.lm.tokenizer, new), strict=True)
