"""Does a latent mean one thing, as far as can be told without a judge?

How alike are the items on which it fires (`pair_sums` has the formula):
    monosemanticity = mean over latents of the weighted mean of c_i·c_j over pairs of items, c the
        items' centred embeddings, in units of their mean square; _all counts latents without as 0;
    _across: the same over pairs of items of two documents; _shuffled: its expectation with codes
        put on other items; _normalised: 0 shuffled, 1 the truth's own score, or 1.
Purity alone is cheap: a latent that finds a tenth of its concept is pure. So it stands beside what
the latent fires for (`fired_concepts`): recall, specificity by quarter of the firings, how many
concepts.

On text an item is a window of `eval.window_tokens` (`text_windows`), its embedding
`eval.embedder`'s (`embedders`), a concept a token or a rule's of `concepts` (effective concepts are
tokens alone, as rules overlap). On a world (`monosemanticity_features`) an item is a row, its
embedding its true code, its concepts the features that are on.
Intervals are over latents, not over documents: a bootstrap over documents would need the sums of
each block of documents, d_sae · width · blocks numbers. They hold the latents' own noise from the
choice of documents, which is nearly independent between latents, but not what is common to all.

Cost: one pass; 2 · firings · width multiplications, and the embedder's own. Memory: 24 bytes for
each latent and column of the embedding; beside it `fired_concepts`'s rows.
Cannot see: the decoder (permuted rows change nothing); latents that fire for a part of their
concept, in the score alone: read it with recall; on text, what the embedder does not tell apart,
and the recall of concepts that are neither tokens nor rules. A rare latent's effective tokens are
few by its rarity alone: compare with the shuffled ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.coder.latents import Latents, from_dense
from sae.evals.concepts import concepts_of_contexts
from sae.evals.embedders import EMBEDDERS
from sae.evals.fired_concepts import (
    N_ROWS,
    NO_CONCEPT,
    ConceptScores,
    Rows,
    lowest,
    score_concepts,
)
from sae.evals.interface import ContextBatch, EvalSetup, Seen, Undefined, Value
from sae.evals.monosemanticity_metrics import LABELS, metrics_of, scores_by_latent
from sae.evals.numbers import halves_of, mixed, token_numbers
from sae.evals.pair_sums import ItemFirings, PairSums
from sae.evals.text_windows import cut_windows, largest_in_windows
from sae.evals.truth import TruthBatch
from sae.stream.vocabulary import token_texts

if TYPE_CHECKING:
    from sae.stream.language_model import LanguageModel

CODE_WIDTH = 2048
FIRST_RULE = 2**40
"""Concepts by rule are numbered from here, those that are tokens by their ids."""
NO_TEXT = "the activations come from no language model, so there is no text to embed"

CANNOT_SEE = ("permuted decoder", "noise fitting", "what the embedder does not tell apart")


class Monosemanticity:
    """Accumulates what `LABELS` lists, from text.

    Errors: RuntimeError where the embedder's package is not installed.
    """

    def __init__(self, setup: EvalSetup) -> None:
        self.setup, self.seen = setup, Seen()
        self.pairs: PairSums | None = None
        self.rows = Rows.empty()
        self._embed = EMBEDDERS[setup.settings.embedder](setup.settings)
        self._texts: dict[int, str] = {}

    def update(self, batch: ContextBatch) -> None:
        """Add a batch of contexts; those without text are only counted."""
        documents = batch.contexts.document_ids.flatten()[batch.kept.cpu()]
        self.seen.update(documents)
        if batch.lm is None or not len(documents):
            return
        self._add_windows(batch)
        contexts, kept, seed = batch.contexts, batch.kept.cpu(), self.setup.seed
        tokens, of_tokens = contexts.tokens.cpu(), contexts.document_ids.cpu()
        numbers = token_numbers(contexts, kept, seed)
        told = concepts_of_contexts(tokens, of_tokens, self._texts_of(tokens, batch.lm))
        by_rule = told.flatten(0, 1)[kept]
        names = torch.where(by_rule, FIRST_RULE + torch.arange(by_rule.shape[1]), NO_CONCEPT)
        most = max(int(by_rule.sum(1).max()), 1)
        concepts = torch.cat([tokens.flatten()[kept, None], names.topk(most).values], 1)
        new = Rows.of(numbers, halves_of(documents, seed), concepts, batch.latents)
        self.rows = lowest([self.rows, new], N_ROWS)

    def merge(self, other: Monosemanticity) -> None:
        """Add what `other` saw."""
        self.seen.merge(other.seen)
        self.rows = lowest([self.rows, other.rows], N_ROWS)
        if other.pairs is not None:
            self._pairs(other.pairs.width).merge(other.pairs)

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module that text has."""
        if self.pairs is None:
            return dict.fromkeys(LABELS, Undefined(NO_TEXT))
        return metrics_of(self.setup, self.pairs, self._concepts(), None)

    def arrays(self) -> dict[str, Tensor]:
        """Return the scores by latent."""
        return (
            {}
            if self.pairs is None
            else scores_by_latent(self.pairs, self._concepts(), on_text=True)
        )

    def _add_windows(self, batch: ContextBatch) -> None:
        windows = cut_windows(batch, self.setup.settings.window_tokens)
        if len(windows.tokens):
            embeddings = self._embed(windows, batch)
            halves = halves_of(windows.documents, self.setup.seed)
            firings = largest_in_windows(batch, windows)
            self._pairs(embeddings.shape[1]).add(embeddings, halves, firings)

    def _texts_of(self, tokens: Tensor, lm: LanguageModel) -> dict[int, str]:
        """Return the text of every token seen so far; each is decoded once."""
        new = [i for i in tokens.unique().tolist() if i not in self._texts]
        self._texts.update(zip(new, token_texts(lm.tokenizer, new), strict=True))
        return self._texts

    def _pairs(self, width: int) -> PairSums:
        if self.pairs is None:
            self.pairs = PairSums(self.setup.d_sae, width)
        return self.pairs

    def _concepts(self) -> ConceptScores:
        return score_concepts(self.rows, self.setup.d_sae, self.setup.seed, by_label=True)


class MonosemanticityOfFeatures:
    """Accumulates what `LABELS` lists, from a world's rows; the oracle's score beside it."""

    def __init__(self, setup: EvalSetup) -> None:
        self.setup, self.seen = setup, Seen()
        truth = setup.require_truth("monosemanticity_features")
        self._frequent = truth.frequent
        width = min(len(truth.directions), CODE_WIDTH)
        self.pairs = PairSums(setup.d_sae, width)
        self.oracle = PairSums(len(self._frequent), width)
        self.rows = Rows.empty()

    def update(self, batch: TruthBatch) -> None:
        """Add n rows."""
        self.seen.update(batch.document_ids)
        halves = halves_of(batch.document_ids, self.setup.seed)
        embeddings = _folded(batch.codes, self.pairs.width)
        self.pairs.add(embeddings, halves, _firings(batch.latents))
        true = batch.codes[:, self._frequent.to(batch.codes.device)]
        self.oracle.add(embeddings, halves, _firings(from_dense(true)))
        numbers = mixed(batch.document_ids).bitwise_and(2**62 - 1)
        on = from_dense(batch.codes)
        concepts = on.indices.where(on.values > 0, NO_CONCEPT)
        new = Rows.of(numbers, halves, concepts, batch.latents)
        self.rows = lowest([self.rows, new], N_ROWS)

    def merge(self, other: MonosemanticityOfFeatures) -> None:
        """Add another's rows."""
        self.seen.merge(other.seen)
        self.rows = lowest([self.rows, other.rows], N_ROWS)
        self.pairs.merge(other.pairs)
        self.oracle.merge(other.oracle)

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module that a world has."""
        return metrics_of(self.setup, self.pairs, self._concepts, self.oracle)

    def arrays(self) -> dict[str, Tensor]:
        """Return the scores by latent."""
        return scores_by_latent(self.pairs, self._concepts, on_text=False)

    @property
    def _concepts(self) -> ConceptScores:
        return score_concepts(self.rows, self.setup.d_sae, self.setup.seed)


def _firings(code: Latents) -> ItemFirings:
    row, slot = (code.values != 0).nonzero(as_tuple=True)
    return ItemFirings(code.indices[row, slot], row, code.values[row, slot].abs())


def _folded(codes: Tensor, width: int) -> Tensor:
    """Return unit codes (n, width): of more features than that, hashed with signs, which leaves
    the expectation of their inner products as it is."""
    if codes.shape[1] > width:
        number = torch.arange(codes.shape[1], device=codes.device)
        sign = 1.0 - 2.0 * (mixed(number) & 1)
        folded = codes.new_zeros(len(codes), width)
        codes = folded.index_add_(1, number % width, codes * sign)
    return torch.nn.functional.normalize(codes.double(), dim=1)
