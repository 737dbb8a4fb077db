"""What metrics make of the truth, of trained dictionaries and of nulls: a table, and which order.

A metric that claims to tell a useless dictionary from a good one must rank
    truth > every trained dictionary > frozen random decoder ≥ random directions > codes shuffled
in time. Each column says which of these pairs it gets wrong. Columns are there for what was
measured.
"""

from __future__ import annotations

import statistics
from itertools import product
from typing import Any

from scipy.stats import spearmanr

TRUTH, SHUFFLED = "oracle", "batchtopk, codes shuffled"
TRAINED = ("matryoshka", "batchtopk", "topk", "matching_pursuit", "relu")
FROZEN, RANDOM = "frozen random decoder", "random directions"
EQUAL_WITHIN = 0.01
COLUMNS = {
    "explained_variance": "EV",
    "l0": "L0",
    "mcc": "MCC",
    "uniqueness": "uniqueness",
    "f1": "F1",
    "f1_act": "F1-act",
    "code_mcc": "code-MCC",
    "probe_auroc_1": "probe k=1 AUROC",
    "tpp_1": "TPP-1",
    "monosemanticity": "MS centred",
    "kurtosis": "kurtosis",
}
NOT_JUDGES = ("l0",)
PRECISION = {"l0": 1, "kurtosis": 0}


def section(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of the table and of what follows from it; none without the nulls."""
    scores = {name: _means(found) for name, found in rows.items() if found}
    if not {TRUTH, SHUFFLED, FROZEN, RANDOM} <= scores.keys():
        return []
    columns = [key for key in COLUMNS if all(key in found for found in scores.values())]
    head = ["dictionary", *(COLUMNS[key] for key in columns)]
    cells = [head, ["---", *["---:"] * len(columns)]]
    cells += [
        [name, *(_number(key, found[key]) for key in columns)] for name, found in scores.items()
    ]
    lines = ["", "## What metrics make of them", ""]
    lines += [f"| {' | '.join(line)} |" for line in cells]
    lines += ["", *_correlation(scores), "", *_orders(scores, columns)]
    return lines


def _means(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return each metric's mean over seeds; None where a seed has none."""
    found = {}
    for key in rows[0]["metrics"]:
        values = [row["metrics"].get(key) for row in rows]
        is_known = all(value is not None for value in values)
        found[key] = statistics.fmean(values) if is_known else None
    return found


def _number(key: str, value: float | None) -> str:
    return "–" if value is None else f"{value:,.{PRECISION.get(key, 3)}f}"


def _correlation(scores: dict[str, dict[str, Any]]) -> list[str]:
    names = [name for name in (TRUTH, *TRAINED) if name in scores]
    if len(names) < 3:
        return []
    ev, f1 = ([scores[name][key] for name in names] for key in ("explained_variance", "f1"))
    rho = float(spearmanr(ev, f1)[0])  # type: ignore[arg-type]
    return [
        f"Over {', '.join(names)}, explained variance ranks against F1 with Spearman {rho:.2f}."
    ]


def _orders(scores: dict[str, dict[str, Any]], columns: list[str]) -> list[str]:
    trained = [name for name in TRAINED if name in scores]
    pairs = [
        *product((TRUTH,), trained),
        *product(trained, (FROZEN,)),
        (FROZEN, RANDOM),
        (RANDOM, SHUFFLED),
    ]
    lines = [
        "Truth > trained > frozen random decoder ≥ random directions > codes shuffled, "
        f"{len(pairs)} pairs (≥ within {EQUAL_WITHIN}); wrong, or equal, are:",
        "",
    ]
    for key in (key for key in columns if key not in NOT_JUDGES):
        wrong = [pair for pair in pairs if not _is_right(pair, scores, key)]
        said = "; ".join(f"{better} over {worse}" for better, worse in wrong) or "none"
        lines.append(f"- {COLUMNS[key]}: {said}")
    return lines


def _is_right(pair: tuple[str, str], scores: dict[str, dict[str, Any]], key: str) -> bool:
    better, worse = (scores[name][key] for name in pair)
    if better is None or worse is None:
        return False
    return better >= worse - EQUAL_WITHIN if pair == (FROZEN, RANDOM) else better > worse
