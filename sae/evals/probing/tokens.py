"""Sparse probing of tokens: do single latents tell concepts that rules can name?

The concepts are those of `sae.evals.concepts`: digits, capitals, quotations, languages, … Tokens
of one half of the documents train, of the other test. Metrics: `scores`; what a probe is: `probes`.

Source: as `probes`; the concepts are ours. Cost: a pass for the tokens, memory `sample`; then about
a quarter of a second a concept. Cannot see: what a latent writes; concepts that take understanding;
what a concept's tokens do outside the text that is evaluated.
"""

from __future__ import annotations

import torch

from sae.coder.latents import Latents
from sae.evals.concepts import CONCEPTS, concepts_of_contexts
from sae.evals.interface import ContextBatch, EvalSetup, Seen
from sae.evals.numbers import halves_of, token_numbers
from sae.evals.probing.scores import Probing, labels_of
from sae.evals.probing.tasks import ConceptRows
from sae.stream.vocabulary import token_texts

PREFIX = "token_probe"
LABELS = labels_of(PREFIX, "concepts of tokens")
NO_TEXT = "the activations come from no language model, so that no token has a text"


def probing_tokens(setup: EvalSetup) -> Probing:
    """Start the eval of this module."""
    return Probing(setup, NamedTokens(setup))


class NamedTokens:
    """Tokens of contexts, by the concepts that rules say."""

    prefix, words, nothing = PREFIX, "tokens: {}", NO_TEXT
    names = tuple(CONCEPTS)

    def __init__(self, setup: EvalSetup) -> None:
        self.seed = setup.seed
        self._texts: dict[int, str] = {}

    def rows(self, batch: ContextBatch, seen: Seen) -> ConceptRows | None:
        """Return a row a token; none of contexts without text, which are only counted."""
        contexts, kept = batch.contexts, batch.kept.cpu()
        tokens, ids = contexts.tokens.cpu(), contexts.document_ids.cpu()
        documents = ids.flatten()[kept]
        seen.update(documents)
        if batch.lm is None:
            return None
        self._read(batch)
        is_on = concepts_of_contexts(tokens, ids, self._texts).flatten(0, 1)[kept]
        return ConceptRows(
            token_numbers(contexts, kept, self.seed),
            halves_of(documents, self.seed),
            is_on,
            torch.ones_like(is_on),
            contexts.activations.flatten(0, 1)[kept.to(contexts.activations.device)].cpu(),
            Latents(*(part.cpu() for part in batch.latents)),
        )

    def _read(self, batch: ContextBatch) -> None:
        """Look up the text of tokens that are new."""
        assert batch.lm is not None
        new = [i for i in batch.contexts.tokens.unique().tolist() if i not in self._texts]
        self._texts |= zip(new, token_texts(batch.lm.tokenizer, new), strict=True)
