"""From values by concept to flat metrics with intervals: what the absorption evals share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.evals.absorption.concepts import COLUMNS, DETECTED
from sae.evals.bootstrap import with_intervals
from sae.evals.interface import EvalSetup, Label, Undefined, Value

OF_DETECTED = {
    "recall_child_on": "recall_on",
    "drop": "drop",
    "full": "full",
    "decoder_leak": "leak",
    "encoder_hole": "hole",
    "hedging": "hedging",
    "latents_per_concept": "latents",
}
NONE_DETECTED = (
    f"no concept of this kind is detected: latents that fire in {DETECTED:.0%} of its rows without "
    "children, and seldom without it"
)


def labels_of(prefix: str, what: str) -> dict[str, Label]:
    """Return the labels of metrics that begin with `prefix`; what: the concepts."""
    found = {
        "detected": Label(f"{what} that some latents detect", "share", "higher", 1),
        "recall_child_off": Label("recall of a concept where no child is", better="higher", best=1),
        "recall_child_on": Label(
            "recall where a child is, of those detected", better="higher", best=1
        ),
        "drop": Label("recall lost where a child is", better="lower", best=0),
        "full": Label("rows absorbed by another latent", "share", "lower", 0),
        "decoder_leak": Label("cosine of a child's latent with its parent"),
        "encoder_hole": Label("cosine of a parent's encoder with its child"),
        "hedging": Label("cosine of a parent's latent with its child"),
        "latents_per_concept": Label("latents that a concept is split into"),
    }
    return {f"{prefix}_{name}": label for name, label in found.items()}


def metrics_of(
    prefix: str, table: Tensor, has_children: Tensor, setup: EvalSetup
) -> dict[str, Value]:
    """Return every metric, with intervals over concepts.

    Shapes: table (concepts, len(COLUMNS)); has_children (concepts) bool.
    """
    columns: dict[str, Tensor] = dict(zip(COLUMNS, table.unbind(1), strict=True))
    columns["drop"] = columns["recall_off"] - columns["recall_on"]
    detected = columns["is_detected"].where(has_children, torch.nan)
    asked = {
        "detected": detected,
        "recall_child_off": columns["recall_off"].where(has_children, torch.nan),
    }
    is_detected = columns["is_detected"] == 1
    for name, column in OF_DETECTED.items():
        counts = is_detected & has_children if name == "full" else is_detected
        asked[name] = columns[column].where(counts, torch.nan)
    return with_intervals(
        lambda weights: {
            f"{prefix}_{name}": _mean(weights, values) for name, values in asked.items()
        },
        torch.isfinite(columns["is_detected"]),
        seed=setup.seed,
        n_resamples=setup.n_resamples,
        reasons=_reasons(prefix, is_detected.any(), columns["hole"]),
    )


def undefined(prefix: str, reason: str) -> dict[str, Value]:
    """Return every metric as undefined."""
    return dict.fromkeys(labels_of(prefix, ""), Undefined(reason))


def _reasons(prefix: str, any_detected: Tensor, holes: Tensor) -> Mapping[str, str]:
    of_detected = NONE_DETECTED
    if any_detected:
        of_detected = "no concept that is detected has a child with enough rows"
    reasons = {name: of_detected for name in OF_DETECTED}
    if any_detected and not torch.isfinite(holes).any():
        reasons["encoder_hole"] = "the dictionary has no encoder rows, or no concept with children"
    reasons["detected"] = reasons["recall_child_off"] = (
        "no concept has enough rows without children"
    )
    return {f"{prefix}_{name}": reason for name, reason in reasons.items()}


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    has = torch.isfinite(values).double()
    return (weights @ values.nan_to_num(0.0)) / (weights @ has)
