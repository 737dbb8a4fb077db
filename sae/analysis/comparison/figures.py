"""The figures by which dictionaries are compared: the headline vector, at a measured L0.

No single number orders dictionaries (docs/defects.md), so the headline is a vector; of each figure
the first metric that any of the dictionaries has is taken. PW-MCC is the mean one-to-one |cosine|
with the dictionaries among those compared that differ from it by their training seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from sae.analysis.comparison.entries import Entry
from sae.configuration import flatten
from sae.evals.interface import Unit, Value
from sae.evals.matching import absolute_cosines, assigned
from sae.evals.pairing import Difference, difference
from sae.interop import load

PW_MCC = "pw_mcc"
LARGEST = 8192
"""Latents beyond which an assignment takes minutes; PW-MCC is then left out."""


@dataclass(frozen=True)
class Figure:
    """A column of the table: its metric, its words, its unit, and which way is better."""

    metric: str
    text: str
    unit: Unit = "number"
    better: Literal["high", "low", "neither"] = "high"


CANDIDATES: tuple[tuple[Figure, ...], ...] = (
    (Figure("fvu", "FVU", better="low"),),
    (Figure("loss_recovered_mean", "loss recovered"),),
    (Figure("kl", "KL", "nats", "low"),),
    (Figure("f1", "F1"), Figure("text_probe_auroc_1", "probe AUROC")),
    (Figure("mcc", "MCC"),),
    (Figure("tpp_1", "TPP-1"),),
    (
        Figure("monosemanticity_normalised", "monosemanticity"),
        # Of text, across documents alone: what fires in bursts looks pure within one.
        Figure("monosemanticity_across", "monosemanticity"),
    ),
    (Figure("ev_minus_oracle", "EV − oracle's", better="neither"),),
    (Figure("dead", "dead", "share", "low"),),
    (Figure(PW_MCC, "PW-MCC"),),
)


def figures_of(entries: Sequence[Entry], pw_mcc: Mapping[str, float]) -> list[Figure]:
    """Return the columns: of each figure the first metric that some dictionary has."""
    measured = {
        name for entry in entries for name, v in entry.results.metrics.items() if v is not None
    }
    measured |= {PW_MCC} if pw_mcc else set()
    chosen = (next((f for f in among if f.metric in measured), None) for among in CANDIDATES)
    return [figure for figure in chosen if figure is not None]


def on_front(entries: Sequence[Entry], metric: str, better: str) -> set[str]:
    """Return the names of those that no other beats in L0 and in `metric` at once."""
    sign = 1 if better == "low" else -1
    points = {
        entry.name: (l0, sign * value)
        for entry in entries
        if (l0 := entry.results.provenance["l0"]) is not None
        and (value := entry.results.metrics.get(metric)) is not None
    }
    return {
        name
        for name, own in points.items()
        if not any(_beats(other, own) for other in points.values())
    }


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def seed_agreement(entries: Sequence[Entry]) -> dict[str, float]:
    """Return PW-MCC of each dictionary that has twins of other seeds among the entries."""
    found: dict[str, list[float]] = {}
    directions: dict[str, object] = {}
    for a, b in combinations(entries, 2):
        if not are_twins(a, b):
            continue
        for entry in (a, b):
            if entry.name not in directions:
                directions[entry.name] = load(entry.place).W_dec.detach().double()
        rows = [directions[entry.name] for entry in (a, b)]
        mcc = float(assigned(absolute_cosines(*rows)).mean())  # pyright: ignore[reportArgumentType]
        for entry in (a, b):
            found.setdefault(entry.name, []).append(mcc)
    return {name: sum(values) / len(values) for name, values in found.items()}


def are_twins(a: Entry, b: Entry) -> bool:
    """Say whether two runs differ in their seed and in nothing else that matters for training."""
    if (
        a.cfg is None
        or b.cfg is None
        or max(a.cfg.coder.d_sae or 0, b.cfg.coder.d_sae or 0) > LARGEST
    ):
        return False
    one, other = (_training_settings(entry) for entry in (a, b))
    return one == other and a.cfg.run.seed != b.cfg.run.seed


def _training_settings(entry: Entry) -> dict[str, object]:
    skipped = ("run.", "eval.", "report.", "fleet.")
    settings = flatten(entry.cfg)
    return {key: value for key, value in settings.items() if not key.startswith(skipped)}


def value_of(entry: Entry, metric: str, pw_mcc: Mapping[str, float]) -> float | None:
    """Return a figure of a dictionary; None where it has none."""
    if metric == PW_MCC:
        return pw_mcc.get(entry.name)
    return entry.results.metrics.get(metric)


def interval_of(entry: Entry, metric: str) -> tuple[float, float] | None:
    """Return the 95% interval of a metric; None where it has none."""
    low, high = (entry.results.metrics.get(f"{metric}/{end}") for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def all_differences(a: Entry, b: Entry) -> dict[str, Difference]:
    """Return a − b of every metric that both have."""
    names = [name for name in a.results.metrics if "/" not in name and name in b.results.metrics]
    found = {name: difference(a.results, b.results, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def as_number(value: Value) -> float | None:
    """Return a number, or None for what is undefined."""
    return value if isinstance(value, float) else None
