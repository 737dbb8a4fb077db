"""What evals found of each latent, for its card and the list's order: scores, and words for it.

Scores are the results' arrays `EVAL/latents/NAME` with one value a latent; those of another
dictionary's width (results of an older run in the same folder) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from sae.analysis.diffing import PlacesOfLatents
from sae.config import EvalName
from sae.evals.interface import Label
from sae.evals.registry import EVALS
from sae.evals.results import EvalResults

MARK = "latents/"


@dataclass(frozen=True)
class LatentScores:
    """`head` goes to the page's scripts as it is, `arrays` beside it: (d_sae) float32 each."""

    head: dict[str, Any] = field(default_factory=lambda: {"measured": [], "explanations": {}})
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def sorts(self) -> list[tuple[str, str]]:
        """Key and words of each order that the list can take."""
        return [(one["key"], f"{one['eval']}: {one['label']}") for one in self.head["measured"]]


def latent_scores(results: EvalResults | None, d_sae: int) -> LatentScores:
    """Return the scores and explanations that the results hold of `d_sae` latents."""
    found = LatentScores()
    for name, array in sorted(results.arrays.items()) if results else ():
        eval_name, _, score = name.partition("/")
        if not score.startswith(MARK) or tuple(array.shape) != (d_sae,):
            continue
        label = _label(eval_name, score.removeprefix(MARK))
        key = f"measured_{len(found.arrays)}"
        found.head["measured"].append(
            {"key": key, "eval": eval_name, "label": label.text, "unit": label.unit}
        )
        found.arrays[key] = array.numpy().astype("float32")
    for rows in results.explanations.values() if results else ():
        for latent, text, by in rows:
            if latent < d_sae:
                found.head["explanations"].setdefault(str(latent), []).append([text, by])
    return found


def with_shares(scores: LatentScores, places: PlacesOfLatents) -> LatentScores:
    """Return the scores with each latent's share of every place that the dictionary writes."""
    measured, arrays = list(scores.head["measured"]), dict(scores.arrays)
    for number, name in enumerate(places.names):
        key = f"share_{number}"
        label = f"share of the norm at {name}"
        measured.append({"key": key, "eval": "places", "label": label, "unit": "share"})
        arrays[key] = places.shares[number].cpu().numpy().astype("float32")
    return LatentScores({**scores.head, "measured": measured}, arrays)


def place_note(places: PlacesOfLatents, fires: Tensor) -> str:
    """Return in words how many of the latents that fire (d_sae) are of which places."""
    counts = places.counts(fires.to(places.is_of.device))
    return f"Of {int(fires.sum()):,} latents that fire: " + ", ".join(
        f"{count:,} {kind}" for kind, count in counts.items()
    )


def _label(eval_name: str, score: str) -> Label:
    """Return the words for a score; one that has none is shown under its own name."""
    names: dict[str, EvalName] = {name: name for name in EVALS}
    labels = EVALS[names[eval_name]].latent_labels if eval_name in names else {}
    return labels.get(score, Label(score.replace("_", " ")))
