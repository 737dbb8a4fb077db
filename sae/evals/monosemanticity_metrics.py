"""What `monosemanticity` reports: words for each metric, means over latents and their intervals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.evals.blocks import N_BLOCKS
from sae.evals.bootstrap import with_intervals
from sae.evals.fired_concepts import QUARTERS, ConceptScores
from sae.evals.interface import EvalSetup, Label, Undefined, Value
from sae.evals.pair_sums import PairSums

NO_PAIR = "no latent fires on two items whose embeddings differ"
NO_CONCEPT_FOUND = "no latent fires on both halves of the documents for a concept of the first"

EVERYWHERE = {
    "monosemanticity": Label("likeness of what a latent fires on, 0 for any two", better="higher"),
    "concept_recall": Label("recall of the concept that it finds best", "share", "higher", 1),
    "concept_specificity": Label(
        "share of its firings that are that concept", "share", "higher", 1
    ),
    "monosemanticity_all": Label("likeness, latents without a score 0", better="higher"),
    "concept_recall_all": Label("recall, latents without a concept 0", "share", "higher", 1),
    "monosemanticity_across": Label("likeness across documents", better="higher"),
    "monosemanticity_shuffled": Label("likeness with codes shuffled, expected"),
    "concept_recall_shuffled": Label("recall with codes shuffled, expected", "share"),
    "concept_specificity_shuffled": Label("specificity with codes shuffled, expected", "share"),
    **{
        f"concept_specificity_q{i}": Label(
            f"specificity, quarter {i} of its firings", "share", "higher", 1
        )
        for i in range(1, QUARTERS + 1)
    },
    "effective_concepts": Label(
        "concepts that a latent fires for, effective number", better="lower", best=1
    ),
    "without_concept": Label(
        "latents that fire for no concept, of those that fire", "share", "lower", 0
    ),
    "monosemanticity_unscored": Label(
        "latents that fire on fewer than two items", "share", "lower", 0
    ),
}
LABELS = {
    **EVERYWHERE,
    "effective_tokens": Label(
        "tokens on which a latent fires, effective number", better="lower", best=1
    ),
    "effective_tokens_shuffled": Label("the same of as many random tokens"),
}
LABELS_OF_FEATURES = {
    **EVERYWHERE,
    "monosemanticity_oracle": Label("likeness of the true features"),
    "monosemanticity_normalised": Label(
        "likeness from shuffled (0) to the truth (1)", better="higher", best=1
    ),
}
LATENT_LABELS = {
    "monosemanticity": Label("likeness of what it fires on"),
    "concept_recall": Label("recall of its best concept", "share"),
    "concept_specificity": Label("specificity for it", "share"),
    "effective_concepts": Label("effective concepts"),
    "effective_tokens": Label("effective tokens"),
}


def metrics_of(
    setup: EvalSetup, pairs: PairSums, concepts: ConceptScores, oracle: PairSums | None
) -> dict[str, Value]:
    """Return every metric; those of a world where there are an oracle's sums."""
    likeness, across = pairs.scores()
    best = None if oracle is None else float(oracle.scores()[0].nanmean())
    fires = pairs.counts.cpu() > 0
    means = {
        "monosemanticity": likeness,
        "concept_recall": concepts.recall,
        "concept_specificity": concepts.specificity,
        "monosemanticity_all": likeness.nan_to_num(0.0),
        "concept_recall_all": concepts.recall.nan_to_num(0.0),
        "monosemanticity_across": across,
        "concept_recall_shuffled": concepts.recall_shuffled,
        "concept_specificity_shuffled": concepts.specificity_shuffled,
        **{f"concept_specificity_q{i + 1}": q for i, q in enumerate(concepts.by_quarter)},
        "without_concept": concepts.effective_concepts.isnan().double().where(fires, torch.nan),
    }
    logs = {"effective_concepts": concepts.effective_concepts.log()}
    if oracle is None:
        logs["effective_tokens"] = concepts.effective_labels.log()
        logs["effective_tokens_shuffled"] = concepts.effective_labels_shuffled.log()
    n_scored = int(likeness.isfinite().sum())
    return {
        **_with_intervals(setup, means, logs, pairs.shuffled, best),
        "monosemanticity_shuffled": _number(pairs.shuffled),
        **({} if best is None else {"monosemanticity_oracle": _number(best)}),
        "monosemanticity_unscored": 1 - n_scored / setup.d_sae,
    }


def _with_intervals(
    setup: EvalSetup,
    means: Mapping[str, Tensor],
    logs: Mapping[str, Tensor],
    shuffled: float,
    best: float | None,
) -> dict[str, Value]:
    """Return means over latents, of `logs` their exponents, with intervals over latents.

    Latents fall into blocks by their number, so that d_sae does not count in the resamples.
    """
    blocks = torch.arange(setup.d_sae) % N_BLOCKS
    sums = {name: _block_sums(column, blocks) for name, column in {**means, **logs}.items()}

    def statistics(weights: Tensor) -> dict[str, Tensor]:
        found = {n: weights @ total / (weights @ count) for n, (total, count) in sums.items()}
        found |= {name: found[name].exp() for name in logs}
        if best is not None:
            gain = found["monosemanticity"] - shuffled
            found["monosemanticity_normalised"] = gain / (best - shuffled)
        return found

    is_present = torch.bincount(blocks, minlength=N_BLOCKS) > 0
    every = {**LABELS, **LABELS_OF_FEATURES}
    reasons = {name: NO_CONCEPT_FOUND for name in every if not name.startswith("mono")}
    reasons |= {name: NO_PAIR for name in every if name.startswith("mono")}
    return with_intervals(
        statistics,
        is_present,
        seed=setup.seed,
        n_resamples=setup.n_resamples,
        reasons=reasons,
        can_pair=False,
    )


def _block_sums(column: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the values that are finite, and their number, (N_BLOCKS) each."""
    is_in = column.isfinite()
    zeros = torch.zeros(N_BLOCKS, dtype=torch.float64)
    total = zeros.index_add(0, blocks, column.double().where(is_in, 0.0))
    return total, zeros.index_add(0, blocks, is_in.double())


def _number(value: float) -> Value:
    return value if value == value else Undefined(NO_PAIR)


def scores_by_latent(
    pairs: PairSums, concepts: ConceptScores, *, on_text: bool
) -> dict[str, Tensor]:
    """Return the scores by latent, under their arrays' names."""
    scores = {
        "monosemanticity": pairs.scores()[0],
        "concept_recall": concepts.recall,
        "concept_specificity": concepts.specificity,
        "effective_concepts": concepts.effective_concepts,
    }
    if on_text:
        scores["effective_tokens"] = concepts.effective_labels
    return {f"latents/{name}": values.float() for name, values in scores.items()}
