"""docs/defects.md says which metric sees which defect; it is measured here, cell by cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from defects import DEFECTS, FiniteWorld, measure, oracle

from sae.evals import EVALS
from sae.evals.interface import DEFECTS as NAMES

PAGE = Path(__file__).parents[2] / "docs" / "defects.md"
SEES, BLIND, REWARDS, UNDEFINED = "sees", "·", "rewards", "undefined"
SHARE, SMALLEST_SCALE = 0.05, 0.5
LOWER_IS_BETTER = (
    *("fvu", "fvu_worst_1pct", "dead", "delta_ce", "kl"),
    *("interference", "mean_abs_cosine", "largest_cosine", "duplicates", "probe_loss"),
    *("absorption_drop", "absorption_full", "absorption_decoder_leak", "absorption_hedging"),
    "absorption_latents_per_concept",
    *("effective_concepts", "without_concept"),
)
NEEDS_WORDS = {
    "autointerp",
    "masking",
    "monosemanticity",
    "probing_tokens",
    "probing_texts",
    "absorption_words",
}
"""Evals of what tokens say: the toy language model's say nothing. They have nulls of their own.
None of its tokens is masked either, so `masking` repeats `reconstruction`."""


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, str]]:
    """The page's cells: by metric and defect."""
    lines = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in PAGE.read_text().splitlines()
             if line.startswith("|") and "---" not in line]  # fmt: skip
    defects, *rows = lines
    return {row[0].strip("`"): dict(zip(defects[1:], row[1:], strict=True)) for row in rows}


@pytest.fixture(scope="module")
def found(table: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """What each metric of the page does at each defect of the plan."""
    world = FiniteWorld()
    best = measure(oracle(world), world)
    with_defect = {name: measure(make(world), world) for name, make in DEFECTS.items()}
    return {
        metric: {
            defect: cell(metric, best[metric], values[metric])
            for defect, values in with_defect.items()
        }
        for metric in table
    }


def cell(metric: str, best: float | None, value: float | None) -> str:
    """Say whether `metric` calls a dictionary with a defect worse than the oracle, as good, better.

    What moves by less than 5% of the oracle's own value (of 0.5, where that is less) is not seen.
    """
    assert best is not None, metric
    if value is None:
        return UNDEFINED
    worse = value - best if metric.split("/")[-1] in LOWER_IS_BETTER else best - value
    if abs(worse) < SHARE * max(abs(best), SMALLEST_SCALE):
        return BLIND
    return SEES if worse > 0 else REWARDS


def test_the_defects_are_those_that_rows_may_name():
    assert tuple(DEFECTS) == NAMES


def test_every_metric_sees_what_the_page_says_and_nothing_else(table, found) -> None:
    wrong = [
        f"{metric}, {defect}: the page says {said}, measured {found[metric].get(defect)}"
        for metric, row in table.items()
        for defect, said in row.items()
        if found[metric].get(defect) != said
    ]
    assert not wrong, "\n".join([*wrong, "", as_page(found)])


def test_the_page_covers_every_defect_and_every_eval(table) -> None:
    assert all(list(row) == list(DEFECTS) for row in table.values())
    assert {metric.split("/")[0] for metric in table} == set(EVALS) - NEEDS_WORDS


@pytest.mark.parametrize("name", sorted(set(EVALS) - NEEDS_WORDS))
def test_an_eval_says_what_none_of_its_metrics_sees(name: str, found) -> None:
    rows = [row for metric, row in found.items() if metric.split("/")[0] == name]
    unseen = {d for d in DEFECTS if not any(row[d] == SEES for row in rows)}
    assert set(EVALS[name].cannot_see) & set(DEFECTS) == unseen  # type: ignore[index]


@pytest.mark.parametrize("defect", DEFECTS)
def test_some_metric_sees_each_defect(defect: str, found) -> None:
    assert any(row[defect] == SEES for row in found.values())


def as_page(found: dict[str, dict[str, str]]) -> str:
    """Return the table as it should stand on the page."""
    head = ["metric", *DEFECTS]
    lines = [head, ["---"] * len(head)]
    lines += [[f"`{metric}`", *row.values()] for metric, row in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
