"""What probing is, whatever the concepts: rows in, a table of tasks, then metrics and words.

The three probing evals are this one with another `Source`, which says of a batch which of its rows
hold which concepts.

All but the last two are means over the tasks that could be scored, with intervals over tasks: which
concepts were asked about matters more than the rows of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.evals.bootstrap import with_intervals
from sae.evals.interface import EvalSetup, Explanation, Label, Seen, Undefined, Value
from sae.evals.probing.probes import SIZES
from sae.evals.probing.tasks import COLUMNS, ConceptRows, ConceptSample, Table

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
    found |= {
        f"balanced_{k}": Label(
            f"the same by {_many(k)}, balanced accuracy", better="higher", best=1
        )
        for k in SIZES
    }
    found |= {
        f"gain_{k}": Label(f"AUROC of {_many(k)} above raw neurons'", better="higher")
        for k in SIZES
    }
    found["loss"] = Label("loss of the best one-latent probe", "nats", "lower", 0)
    found["auroc_shuffled"] = Label("AUROC of one latent for shuffled labels")
    found |= {f"neurons_auroc_{k}": Label(f"AUROC of {_many(k, 'raw neuron')}") for k in SIZES}
    components = "principal component"
    found |= {f"pca_auroc_{k}": Label(f"AUROC of {_many(k, components)}") for k in SIZES}
    found["x_auroc"] = Label("AUROC of all of x, the ceiling")
    found["x_balanced"] = Label("balanced accuracy of all of x")
    found["positive_share"] = Label("rows that hold the concept, before balancing", "share")
    found["tasks"] = Label("concepts scored")
    return {f"{prefix}_{name}": label for name, label in found.items()}


def latent_labels(prefix: str, what: str) -> dict[str, Label]:
    """Return the label of the score by latent."""
    return {f"{prefix}_auroc": Label(f"tells a {what}, AUROC")}


def _many(k: int, what: str = "latent") -> str:
    return f"one {what}" if k == 1 else f"{k} {what}s"


class Source(Protocol):
    """Where the rows of concepts come from.

    Attributes:
        prefix: of the metrics' names. names: of the concepts. words: what a latent chosen for a
            concept is said to mean, with {} for the concept. nothing: why there may be no row.
    """

    prefix: str
    names: tuple[str, ...]
    words: str
    nothing: str

    def rows(self, batch: Any, seen: Seen, /) -> ConceptRows | None:
        """Count a batch in `seen` and return its rows; None where it has none."""
        ...


class Probing:
    """A sample of concepts' rows, and what probes find in it: computed once for what it holds."""

    def __init__(self, setup: EvalSetup, source: Source) -> None:
        self.setup, self.source, self.seen = setup, source, Seen()
        self.prefix = source.prefix
        self.sample = ConceptSample(source.names, setup.settings.probe_examples)
        self._table: Table | None = None

    def update(self, batch: Any) -> None:
        """Add a batch of the kind that the source reads."""
        rows = self.source.rows(batch, self.seen)
        if rows is not None:
            self._table = None
            self.sample.update(rows)

    def merge(self, other: Probing) -> None:
        """Add another's rows."""
        self._table = None
        self.seen.merge(other.seen)
        self.sample.merge(other.sample)

    def compute(self) -> dict[str, Value]:
        """Return every metric, with intervals over concepts."""
        if not self.sample.has_rows:
            return dict.fromkeys(labels_of(self.prefix, ""), Undefined(self.source.nothing))
        return self._metrics()

    def arrays(self) -> Mapping[str, Tensor]:
        """Return by task its values (len(COLUMNS)) and latents, and by latent its best AUROC."""
        if not self.sample.has_rows:
            return {}
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
        if not self.sample.has_rows:
            return []
        best: dict[int, tuple[float, str]] = {}
        for name, values, latents in zip(self.sample.names, *self._found(), strict=True):
            latent, score = int(latents[0]), float(values[0])
            if latent >= 0 and score > best.get(latent, (0.5, ""))[0]:
                best[latent] = (score, name)
        return [
            Explanation(latent, f"{self.source.words.format(name)} (AUROC {score:.2f})", "probe")
            for latent, (score, name) in sorted(best.items())
        ]

    def _metrics(self) -> dict[str, Value]:
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

    def _found(self) -> Table:
        if self._table is None:
            self._table = self.sample.table(self.setup.d_sae, self.setup.seed)
        return self._table


def _mean(weights: Tensor, column: Tensor) -> Tensor:
    return weights @ column / weights.sum(1)
