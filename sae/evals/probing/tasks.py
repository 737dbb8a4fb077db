"""Balanced tasks from rows whose concepts are known, and what probes find in them.

The one idea: every concept gets the same number of rows, drawn uniformly: half of them with the
concept, half without, in each of two parts that share no document. So a rare concept is no harder
to score, a frequent one costs no more, and its share among all rows is reported beside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.numbers import HALVES
from sae.evals.probing.probes import (
    SIZES,
    Part,
    probe_columns,
    probe_latents,
    probe_whole,
    quick_fits,
    shuffled_auroc,
)
from sae.evals.probing.sample import RowSample

CELLS = 2 * HALVES
LEAST_ROWS = 8
COMPONENT_ROWS, N_COMPONENTS = 2048, 64
SMALLEST_VARIANCE = 1e-9

COLUMNS = (
    *(f"auroc_{k}" for k in SIZES),
    *(f"balanced_{k}" for k in SIZES),
    "loss",
    "auroc_shuffled",
    *(f"neurons_auroc_{k}" for k in SIZES),
    *(f"pca_auroc_{k}" for k in SIZES),
    "x_auroc",
    "x_balanced",
    "positive_share",
    "train_rows",
    "test_rows",
)
"""What is known of each task, in the order of `Table.values`' columns."""


class ConceptRows(NamedTuple):
    """n rows, each of which may or may not hold each concept.

    Shapes: numbers, halves (n) int64: of `numbers`, and which part of the tasks a row is for;
    is_on, is_known (n, concepts) bool; x (n, d); latents (n, k) each; on the CPU.
    """

    numbers: Tensor
    halves: Tensor
    is_on: Tensor
    is_known: Tensor
    x: Tensor
    latents: Latents


class Table(NamedTuple):
    """What probes found: values (tasks, len(COLUMNS)) float64, NaN where a task could not be
    scored; latents (tasks, c) int64, chosen for each, the best first, −1 where none was."""

    values: Tensor
    latents: Tensor


class ConceptSample:
    """Rows for the task of every concept.

    Args:
        names: of the concepts. n_examples: rows of a task, both parts together.
    """

    def __init__(self, names: Sequence[str], n_examples: int) -> None:
        self.names = tuple(names)
        self.rows = RowSample(CELLS * len(self.names), n_examples // CELLS)

    @property
    def has_rows(self) -> bool:
        """Whether any row came in."""
        return bool(self.rows.counts.any())

    def update(self, rows: ConceptRows) -> None:
        """Add rows."""
        in_half = torch.stack([rows.halves == half for half in range(HALVES)], 1)
        is_off, is_on = rows.is_known & ~rows.is_on, rows.is_known & rows.is_on
        by_label = torch.stack([is_off, is_on], 2)
        is_in = in_half[:, None, :, None] & by_label[:, :, None, :]
        self.rows.update(rows.numbers, is_in.flatten(1), rows.x, rows.latents)

    def merge(self, other: ConceptSample) -> None:
        """Add another's rows."""
        self.rows.merge(other.rows)

    def parts(self) -> Iterator[tuple[Part, Part] | None]:
        """Yield each task's training and test rows; None where it has too few of a kind."""
        sizes = self.rows.has.sum(1).view(-1, HALVES, 2).amin(2)
        for number, (n_train, n_test) in enumerate(sizes.tolist()):
            is_enough = min(n_train, n_test) >= LEAST_ROWS
            yield (
                (self._part(number, 0, n_train), self._part(number, 1, n_test))
                if is_enough
                else None
            )

    def positive_shares(self) -> Tensor:
        """Return the share of rows with each concept among all that were seen, (concepts)."""
        off, on = self.rows.counts.view(-1, HALVES, 2).sum(1).double().unbind(1)
        return on / (on + off).clamp_min(1)

    def table(self, d_sae: int, seed: int) -> Table:
        """Return what probes find in every task."""
        generator = torch.Generator().manual_seed(seed)
        tasks = list(self.parts())
        values = torch.full((len(tasks), len(COLUMNS)), torch.nan, dtype=torch.float64)
        latents = torch.full((len(tasks), min(SIZES[-1], d_sae)), -1)
        components = torch.empty(0)
        scored = {number: task for number, task in enumerate(tasks) if task is not None}
        if scored:
            components = _components([train.x for train, _ in scored.values()])
        for number, task in scored.items():
            with quick_fits():
                found, latents[number] = _scores(*task, components, d_sae, generator)
            found["positive_share"] = float(self.positive_shares()[number])
            row = [found[name] for name in COLUMNS]
            values[number] = torch.tensor(row, dtype=torch.float64)
        return Table(values, latents)

    def _part(self, number: int, half: int, n: int) -> Part:
        cells = [number * CELLS + half * 2 + label for label in (0, 1)]
        rows = self.rows
        x, values, indices = (
            torch.cat([whole[cell, :n] for cell in cells])
            for whole in (rows.x, rows.values, rows.indices)
        )
        return Part(x, Latents(values, indices), torch.arange(2 * n) >= n)


def _scores(
    train: Part, test: Part, components: Tensor, d_sae: int, generator: torch.Generator
) -> tuple[dict[str, float], Tensor]:
    labels = (train.is_on, test.is_on)
    found, chosen = probe_latents(train, test, d_sae)
    found["auroc_shuffled"] = shuffled_auroc(train, test, d_sae, generator)
    on_components = (train.x @ components, test.x @ components)
    for name, columns in (("neurons", (train.x, test.x)), ("pca", on_components)):
        scores = probe_columns(*columns, labels)
        found |= {f"{name}_auroc_{k}": score for k, score in scores.items()}
    whole = probe_whole(train.x, test.x, labels)
    found |= {"x_auroc": whole.auroc, "x_balanced": whole.balanced_accuracy}
    return found | {"train_rows": len(labels[0]), "test_rows": len(labels[1])}, chosen


def _components(rows: Sequence[Tensor]) -> Tensor:
    """Return the leading principal components of all training rows, (d, at most N_COMPONENTS)."""
    x = torch.cat(list(rows)).double()
    x = x[:: max(len(x) // COMPONENT_ROWS, 1)]
    x = x - x.mean(0)
    is_wide = x.shape[1] > len(x)
    variances, vectors = torch.linalg.eigh(x @ x.T if is_wide else x.T @ x)
    vectors = vectors[:, variances > SMALLEST_VARIANCE * variances[-1]].flip(1)[:, :N_COMPONENTS]
    directions = x.T @ vectors if is_wide else vectors
    return (directions / directions.norm(dim=0).clamp_min(1e-12)).float()
