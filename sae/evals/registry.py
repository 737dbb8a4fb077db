"""The evals by name. To add one: its file, a row here, its name in `config.EvalName`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import cast

from sae.config import EvalName
from sae.evals import downstream, geometry, ground_truth, perturbation, reconstruction, sparsity
from sae.evals.interface import DEFECTS, EvalRow
from sae.evals.intervening import interventions
from sae.evals.judging import autointerp

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
        "full",
        interventions.CANNOT_SEE,
        interventions.LATENT_LABELS,
    ),
}


def checked_names(names: Iterable[str]) -> tuple[EvalName, ...]:
    """Return `names` without repeats.

    Errors: ValueError for a name that is no eval, with the near one.
    """
    given = tuple(dict.fromkeys(names))
    for name in given:
        if name not in EVALS:
            near = difflib.get_close_matches(name, EVALS, 1)
            hint = f"Did you mean {near[0]!r}?" if near else "Choose among them."
            raise ValueError(f"every eval must be one of {list(EVALS)}; got {name!r}. {hint}")
    if not given:
        raise ValueError(f"at least one eval must be named; got none. Choose among {list(EVALS)}.")
    return cast("tuple[EvalName, ...]", given)
