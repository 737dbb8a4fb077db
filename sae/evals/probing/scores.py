"""From a table of tasks to flat metrics, arrays and words: what the three probing evals share.

All but the last two are means over the tasks that could be scored, with intervals over tasks: which
concepts were asked about matters more than the rows of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sae.evals.bootstrap import with_intervals
from sae.evals.interface import EvalSetup, Explanation, Label, Undefined, Value
from sae.evals.probing.probes import SIZES
from sae.evals.probing.tasks import COLUMNS, ConceptSample, Table

NO_TASK = "no concept has enough rows of each kind in both parts"
CANNOT_SEE = (
    *("permuted decoder", "a broken decoder"),
    *("latents without a concept", "concepts that nobody labelled"),
)


def labels_of(prefix: str, what: str) -> dict[str, Label]:
    """Return the labels of an eval whose metrics begin with `prefix`; what: its concepts."""
    found = {
        f"auroc_{k}": Label(f"{what} told by {_many(k)}, AUROC", better="higher", best=1)
        for k in SIZES
    }
    found |= {f"balanced_{k}": Label(f"the same by {_many(k)}, balanced accuracy") for k in SIZES}
    found |= {f"gain_{k}": Label(f"AUROC of {_many(k)} above raw neurons'") for k in SIZES}
    found["loss"] = Label("loss of the best one-latent probe", "nats")
    found["auroc_shuffled"] = Label("AUROC of one latent for shuffled labels")
    found |= {f"neurons_auroc_{k}": Label(f"AUROC of {k} raw neurons") for k in SIZES}
    found |= {f"pca_auroc_{k}": Label(f"AUROC of {k} principal components") for k in SIZES}
    found["x_auroc"] = Label("AUROC of all of x, the ceiling")
    found["x_balanced"] = Label("balanced accuracy of all of x")
    found["positive_share"] = Label("rows that hold the concept, before balancing", "share")
    found["tasks"] = Label("concepts scored")
    return {f"{prefix}_{name}": label for name, label in found.items()}


def latent_labels(prefix: str, what: str) -> dict[str, Label]:
    """Return the label of the score by latent."""
    return {f"{prefix}_auroc": Label(f"tells a {what}, AUROC")}


def _many(k: int) -> str:
    return "one latent" if k == 1 else f"{k} latents"


class Probed:
    """A sample of concepts' rows, and what probes found in it: computed once for what it holds.

    Args:
        prefix: of the metrics' names. words: what a latent chosen for a concept is said to mean,
            with {} for the concept.
    """

    def __init__(self, setup: EvalSetup, prefix: str, names: Sequence[str], words: str) -> None:
        self.setup, self.prefix, self.words = setup, prefix, words
        self.sample = ConceptSample(names, setup.settings.probe_examples)
        self._table: Table | None = None

    def changed(self) -> ConceptSample:
        """Return the sample, to add rows to it."""
        self._table = None
        return self.sample

    def metrics(self) -> dict[str, Value]:
        """Return every metric."""
        values = self._found().values
        is_scored = torch.isfinite(values).all(1)
        columns = dict(zip(COLUMNS, values.nan_to_num(0.0).unbind(1), strict=True))
        names = [name for name in COLUMNS if not name.endswith("_rows")]
        asked = {f"{self.prefix}_{name}": columns[name] for name in names}
        gains = {k: columns[f"auroc_{k}"] - columns[f"neurons_auroc_{k}"] for k in SIZES}
        asked |= {f"{self.prefix}_gain_{k}": gain for k, gain in gains.items()}
        found = with_intervals(
            lambda weights: {name: _mean(weights, column) for name, column in asked.items()},
            is_scored,
            seed=self.setup.seed,
            n_resamples=self.setup.n_resamples,
            reasons=dict.fromkeys(asked, NO_TASK),
        )
        return found | {f"{self.prefix}_tasks": float(is_scored.sum())}

    def undefined(self, reason: str) -> dict[str, Value]:
        """Return every metric as undefined."""
        return dict.fromkeys(labels_of(self.prefix, ""), Undefined(reason))

    def arrays(self) -> Mapping[str, Tensor]:
        """Return by task its values (len(COLUMNS)) and latents, and by latent its best AUROC."""
        table = self._found()
        by_latent = torch.full((self.setup.d_sae,), torch.nan)
        found: dict[str, Tensor] = {f"latents/{self.prefix}_auroc": by_latent}
        for name, values, latents in zip(self.sample.names, *table, strict=True):
            found[f"tasks/{name}"] = values.clone()
            found[f"chosen/{name}"] = latents.clone()
            if latents[0] >= 0:
                score = values[0].float()
                by_latent[latents[0]] = torch.fmax(by_latent[latents[0]], score)
        return found

    def explanations(self) -> list[Explanation]:
        """Return for latents that are the best of a concept that concept, its best one first."""
        table = self._found()
        best: dict[int, tuple[float, str]] = {}
        for name, values, latents in zip(self.sample.names, *table, strict=True):
            latent, score = int(latents[0]), float(values[0])
            if latent >= 0 and score > best.get(latent, (0.5, ""))[0]:
                best[latent] = (score, name)
        return [
            Explanation(latent, f"{self.words.format(name)} (AUROC {score:.2f})", "probe")
            for latent, (score, name) in sorted(best.items())
        ]

    def _found(self) -> Table:
        if self._table is None:
            self._table = self.sample.table(self.setup.d_sae, self.setup.seed)
        return self._table


def _mean(weights: Tensor, column: Tensor) -> Tensor:
    return weights @ column / weights.sum(1)
