"""Compare dictionaries by their results: a table, `compare.json`, and one page, `compare.html`.

The first dictionary is the one that the others are compared with. Where all were evaluated on the
same tokens, differences come with intervals of a paired bootstrap over documents (`evals.pairing`).

`compare.json`:
    schema        "sae.comparison/1"
    is_paired     whether all were evaluated on the same tokens, documents, seeds and models
    provenance    of the first: model, hookpoint, world, tokens, documents, seed, versions
    dictionaries  [{name, activation, d_sae, l0, headline: {metric: {value, low, high}},
                  is_on_front: {metric: bool}, metrics: {name: number or null}}, …]
    differences   [{a, b, metrics: {name: {value, low, high}}}, …]: a − b, for every pair; bounds
                  are null where a metric has no interval over documents
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from sae.analysis.comparison.entries import Entry, open_entries
from sae.analysis.comparison.figures import (
    Figure,
    all_differences,
    as_number,
    figures_of,
    interval_of,
    on_front,
    seed_agreement,
    value_of,
)
from sae.evals.pairing import Difference, require_comparable
from sae.files import write_json

SCHEMA = "sae.comparison/1"
DATA, PAGE = "compare.json", "compare.html"
FRONTS = (("fvu", "low"), ("loss_recovered_mean", "high"), ("f1", "high"))
OF_ALL = ("model", "hookpoint", "world", "n_tokens", "n_documents", "seed", "evaluated", "sae")


@dataclass(frozen=True)
class Comparison:
    """The dictionaries, their figures, and the differences of each pair, if they are paired."""

    entries: list[Entry]
    figures: list[Figure]
    pw_mcc: Mapping[str, float]
    is_paired: bool
    differences: Mapping[tuple[str, str], Mapping[str, Difference]]

    def value(self, entry: Entry, figure: Figure) -> float | None:
        """Return a figure of a dictionary."""
        return value_of(entry, figure.metric, self.pw_mcc)

    def from_first(self, entry: Entry) -> Mapping[str, Difference]:
        """Return a dictionary's differences from the first one; none where they are unpaired."""
        return self.differences.get((entry.name, self.entries[0].name), {})


def compare(paths: Sequence[Path], *, unpaired: bool = False) -> Comparison:
    """Return the comparison of run folders, dictionary folders or results files.

    Errors: ValueError where one has no results, and where results are not of the same tokens,
    documents, seeds and models, unless `unpaired`.
    """
    entries = open_entries(paths)
    if not unpaired:
        require_comparable({entry.name: entry.results for entry in entries})
    pw_mcc = seed_agreement(entries)
    pairs = () if unpaired else combinations(entries, 2)
    differences = {(b.name, a.name): all_differences(b, a) for a, b in pairs}
    figures = figures_of(entries, pw_mcc)
    return Comparison(entries, figures, pw_mcc, not unpaired, differences)


def write_comparison(found: Comparison, folder: Path) -> Path:
    """Write both files into `folder`; return the page's path."""
    from sae.analysis.comparison.page import write_page

    write_json(folder / DATA, as_json(found))
    return write_page(found, folder / PAGE)


def as_json(found: Comparison) -> dict[str, Any]:
    """Return what `compare.json` holds."""
    first = found.entries[0].results.provenance
    fronts = {metric: on_front(found.entries, metric, better) for metric, better in FRONTS}
    return {
        "schema": SCHEMA,
        "is_paired": found.is_paired,
        "provenance": {key: first.get(key) for key in OF_ALL},
        "dictionaries": [_described(found, entry, fronts) for entry in found.entries],
        "differences": [
            {"a": a, "b": b, "metrics": {name: _plain(one) for name, one in metrics.items()}}
            for (a, b), metrics in found.differences.items()
        ],
    }


def _described(found: Comparison, entry: Entry, fronts: Mapping[str, set[str]]) -> dict[str, Any]:
    headline = {}
    for figure in found.figures:
        low, high = interval_of(entry, figure.metric) or (None, None)
        value = found.value(entry, figure)
        headline[figure.metric] = {"value": value, "low": low, "high": high}
    return {
        "name": entry.name,
        **entry.settings,
        "l0": entry.results.provenance["l0"],
        "headline": headline,
        "is_on_front": {metric: entry.name in best for metric, best in fronts.items() if best},
        "metrics": dict(entry.results.metrics),
    }


def _plain(one: Difference) -> dict[str, float | None]:
    return {"value": one.value, "low": as_number(one.low), "high": as_number(one.high)}
