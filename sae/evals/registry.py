"""The evals by name. To add one: its file, a row here, its name in `config.EvalName`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import cast, get_args

from sae.config import EvalName, EvalSetName
from sae.evals import (
    downstream,
    geometry,
    ground_truth,
    masking,
    monosemanticity,
    monosemanticity_metrics,
    perturbation,
    reconstruction,
    sparsity,
)
from sae.evals.absorption import features as absorption_features
from sae.evals.absorption import words as absorption_words
from sae.evals.interface import DEFECTS, EvalRow, Reads
from sae.evals.intervening import interventions
from sae.evals.judging import autointerp
from sae.evals.probing import features, scores, texts, tokens

FITS_X = ("absorption", "splitting", "noise fitting")

EVALS: dict[EvalName, EvalRow] = {
    "reconstruction": EvalRow(
        reconstruction.Reconstruction, "activations", reconstruction.LABELS, cannot_see=FITS_X
    ),
    "sparsity": EvalRow(
        sparsity.Sparsity,
        "activations",
        sparsity.LABELS,
        cannot_see=tuple(defect for defect in DEFECTS if defect != "half dead"),
    ),
    "masking": EvalRow(masking.Masking, "contexts", masking.LABELS, cannot_see=FITS_X),
    "geometry": EvalRow(
        geometry.Geometry,
        "weights",
        geometry.LABELS,
        cannot_see=tuple(defect for defect in DEFECTS if defect != "splitting"),
        latent_labels=geometry.LATENT_LABELS,
    ),
    "downstream": EvalRow(downstream.Downstream, "model", downstream.LABELS, cannot_see=FITS_X),
    "ground_truth": EvalRow(ground_truth.GroundTruth, "world", ground_truth.LABELS),
    "perturbation": EvalRow(
        perturbation.Perturbation, "world", perturbation.LABELS, "full", perturbation.CANNOT_SEE
    ),
    "autointerp": EvalRow(
        autointerp.Autointerp,
        "contexts",
        autointerp.LABELS,
        "full",
        autointerp.CANNOT_SEE,
        autointerp.LATENT_LABELS,
    ),
    "interventions": EvalRow(
        interventions.Interventions,
        "contexts",
        interventions.LABELS,
        "minutes",
        interventions.CANNOT_SEE,
        interventions.LATENT_LABELS,
    ),
    "probing_features": EvalRow(
        features.probing_features,
        "world",
        features.LABELS,
        "minutes",
        scores.CANNOT_SEE,
        scores.latent_labels(features.PREFIX, "feature"),
    ),
    "probing_tokens": EvalRow(
        tokens.probing_tokens,
        "contexts",
        tokens.LABELS,
        "minutes",
        scores.CANNOT_SEE,
        scores.latent_labels(tokens.PREFIX, "concept of tokens"),
    ),
    "probing_texts": EvalRow(
        texts.probing_texts,
        "labelled",
        texts.LABELS,
        "minutes",
        scores.CANNOT_SEE,
        scores.latent_labels(texts.PREFIX, "class of texts"),
    ),
    "absorption_features": EvalRow(
        absorption_features.AbsorptionFeatures,
        "world",
        absorption_features.LABELS,
        "full",
        absorption_features.CANNOT_SEE,
    ),
    "absorption_words": EvalRow(
        absorption_words.AbsorptionWords,
        "contexts",
        absorption_words.LABELS,
        "full",
        absorption_words.CANNOT_SEE,
    ),
    "monosemanticity": EvalRow(
        monosemanticity.Monosemanticity,
        "contexts",
        monosemanticity_metrics.LABELS,
        "full",
        monosemanticity.CANNOT_SEE,
        monosemanticity_metrics.LATENT_LABELS,
    ),
    "monosemanticity_features": EvalRow(
        monosemanticity.MonosemanticityOfFeatures,
        "world",
        monosemanticity_metrics.LABELS_OF_FEATURES,
        "full",
        monosemanticity.CANNOT_SEE,
        monosemanticity_metrics.LATENT_LABELS,
    ),
}

SETS: tuple[EvalSetName, ...] = get_args(EvalSetName)


def checked_names(names: Iterable[str]) -> tuple[EvalName | EvalSetName, ...]:
    """Return `names`, of evals or sets of them, without repeats.

    Errors: ValueError for a name that is neither, with the near one.
    """
    given = tuple(dict.fromkeys(names))
    for name in given:
        if name not in EVALS and name not in SETS:
            known = [*EVALS, *SETS]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {near[0]!r}?" if near else "Choose among them."
            raise ValueError(f"every eval must be one of {known}; got {name!r}. {hint}")
    if not given:
        raise ValueError(f"at least one eval must be named; got none. Choose among {list(EVALS)}.")
    return cast("tuple[EvalName | EvalSetName, ...]", given)


def chosen_names(names: Iterable[str] | None, readable: Iterable[Reads]) -> tuple[EvalName, ...]:
    """Return the evals that `names` asks for, sets replaced by what can be read of them.

    None: all that can be read and take less than minutes. An eval that is named stays, whatever it
    reads.

    Errors: as of `checked_names`.
    """
    kinds = set(readable)
    able: list[EvalName] = [name for name, row in EVALS.items() if row.reads in kinds]
    if names is None:
        return tuple(name for name in able if EVALS[name].cost != "minutes")
    chosen: dict[EvalName, None] = {}
    for name in checked_names(names):
        if name in SETS:
            chosen |= dict.fromkeys(one for one in able if _is_member(one, name))
        else:
            chosen[cast("EvalName", name)] = None
    return tuple(chosen)


def _is_member(name: EvalName, of_set: str) -> bool:
    if of_set in ("fast", "full"):
        return of_set == "full" or EVALS[name].cost == "fast"
    return name.startswith(f"{of_set}_")
