"""What latents fire for, among known concepts: how surely, how often, and how many.

A row (a token, a sample of a world) bears concepts: its token and what rules say of it, or the
features that are on in it.
Rows fall into two halves by document. On the one each latent is given the concept with the best F1
against "the latent fires"; on the other that concept c is scored:
    specificity = P(c | latent fires), also by quarter of the latent's firings, weakest first;
    recall = P(latent fires | c).
Shuffled in time, a latent would have specificity P(c) and recall P(latent fires) in expectation.
From both halves:
    effective_concepts = exp H(p),  p ∝ P(c | fires) − P(c) of the concepts that a latent fires for:
        those on in more of its n rows than chance gives, n P(c) + 4 √(n P(c)) + 4;
    effective_labels = exp H(first concept | fires), with every count as it is: of n firings at most
        n, so it stands beside what as many rows drawn at random have.

The rows are a uniform sample of at most `N_ROWS`, those with the lowest pseudorandom numbers: the
same for any batches, order and processes. Memory: their codes and concepts, whatever d_sae is; to
compute, tables of `CELLS` counts. Rare latents that fire on few of these rows are scored by few.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.judging.sampling import rank_in_run

N_ROWS = 65_536
NO_CONCEPT = -1
CELLS = 2**23
HALVES, QUARTERS = 2, 4
N_COLUMNS = 6
MIN_FIRINGS = 8
CHANCE = 4.0


class Rows(NamedTuple):
    """n rows.

    Shapes: numbers (n) int64, which rows come first; halves (n) 0 or 1; concepts (n, l) int64,
    NO_CONCEPT where there are fewer; latents (n, k) int32, values (n, k), 0 where none fires.
    """

    numbers: Tensor
    halves: Tensor
    concepts: Tensor
    latents: Tensor
    values: Tensor

    @classmethod
    def of(cls, numbers: Tensor, halves: Tensor, concepts: Tensor, code: Latents) -> Rows:
        """Return rows on the CPU."""
        parts = (numbers, halves, concepts, code.indices.int(), code.values.abs().float())
        return cls(*(part.cpu() for part in parts))

    @classmethod
    def empty(cls) -> Rows:
        """Return none."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls.of(none, none, none[:, None], Latents(torch.zeros(0, 1), none[:, None]))


def lowest(parts: list[Rows], n: int) -> Rows:
    """Return the `n` rows of lowest number, in that order."""
    joined = Rows(*(_stacked(column) for column in zip(*parts, strict=True)))
    order = joined.numbers.argsort(stable=True)[:n]
    return Rows(*(part[order] for part in joined))


def _stacked(column: tuple[Tensor, ...]) -> Tensor:
    """Join along rows; those with fewer slots get empty ones."""
    if column[0].dim() == 1:
        return torch.cat(column)
    width = max(part.shape[1] for part in column)
    fill = 0.0 if column[0].is_floating_point() else NO_CONCEPT
    padded = [torch.nn.functional.pad(p, (0, width - p.shape[1]), value=fill) for p in column]
    return torch.cat(padded)


class ConceptScores(NamedTuple):
    """(m) float64 of each latent, NaN where undefined; by_quarter (QUARTERS, m).

    concept: the one that a latent was given, NO_CONCEPT where none.
    """

    concept: Tensor
    specificity: Tensor
    recall: Tensor
    by_quarter: Tensor
    specificity_shuffled: Tensor
    recall_shuffled: Tensor
    effective_concepts: Tensor
    effective_labels: Tensor
    effective_labels_shuffled: Tensor


def score_concepts(
    rows: Rows, n_latents: int, seed: int, *, by_label: bool = False
) -> ConceptScores:
    """Return what `rows` say of each of `n_latents` latents.

    by_label: effective concepts are of rows' first concepts alone, for concepts that overlap.
    """
    names, numbered = rows.concepts.unique(return_inverse=True)
    has_none = int(len(names) > 0 and names[0] == NO_CONCEPT)
    table = _Table(rows._replace(concepts=numbered - has_none), n_latents, len(names) - has_none)
    chosen, columns = table.all_scores(by_label)
    by_quarter = table.by_quarter(chosen)
    shuffled = _shuffled_effective(table.of_labels, table.n_fires.sum(0), seed)
    concept = torch.full((n_latents,), NO_CONCEPT, dtype=torch.int64)
    concept[chosen >= 0] = names[chosen[chosen >= 0] + has_none]
    specificity, recall, chance_specificity, chance_recall, n_concepts, n_labels = columns
    return ConceptScores(
        concept=concept,
        specificity=specificity,
        recall=recall,
        by_quarter=by_quarter,
        specificity_shuffled=chance_specificity,
        recall_shuffled=chance_recall,
        effective_concepts=n_concepts,
        effective_labels=n_labels,
        effective_labels_shuffled=shuffled,
    )


class _Table:
    """Counts of rows by half, latent and concept, a chunk of latents at a time.

    Attributes:
        n (2): rows. n_fires (2, m). n_bears (2, c). of_labels (c): rows by their first concept.
        firings: (p) row, latent, value of what fires, sorted by latent, then by value.
    """

    def __init__(self, rows: Rows, m: int, c: int) -> None:
        self.rows, self.m, self.c = rows, m, c
        row, slot = (rows.values != 0).nonzero(as_tuple=True)
        latent, value = rows.latents[row, slot].long(), rows.values[row, slot]
        order = value.argsort(stable=True)
        order = order[latent[order].argsort(stable=True)]
        self.row, self.latent = row[order], latent[order]
        self.n = torch.bincount(rows.halves, minlength=HALVES).double()
        self.n_fires = _counts(rows.halves[self.row] * m + self.latent, HALVES, m)
        at, place = (rows.concepts >= 0).nonzero(as_tuple=True)
        self.n_bears = _counts(rows.halves[at] * c + rows.concepts[at, place], HALVES, c)
        first = rows.concepts[:, 0] if rows.concepts.shape[1] else rows.concepts.flatten()
        self.of_labels = torch.bincount(first[first >= 0], minlength=c).double()

    def chunks(self) -> Iterator[range]:
        """Yield all latents, so many at once that their counts fit into CELLS."""
        size = max(CELLS // (HALVES * max(self.c, 1)), 1)
        yield from (range(i, min(i + size, self.m)) for i in range(0, self.m, size))

    def all_scores(self, by_label: bool) -> tuple[Tensor, Tensor]:
        """Return the number of each latent's concept (m), and the columns of `scores` behind it.

        They go into tensors made beforehand: small ones made between the large temporary ones kept
        the heap from shrinking, by gigabytes at 65,536 latents.
        """
        chosen = torch.full((self.m,), NO_CONCEPT, dtype=torch.int64)
        columns = torch.full((N_COLUMNS, self.m), torch.nan, dtype=torch.float64)
        for latents in self.chunks():
            rows = slice(latents.start, latents.stop)
            chosen[rows], *found = self.scores(latents, by_label)
            for column, part in zip(columns, found, strict=True):
                column[rows] = part
        return chosen, columns

    def scores(self, latents: range, by_label: bool) -> tuple[Tensor, ...]:
        """Return of each latent its concept's number, specificity, recall, what both would be if
        shuffled, effective concepts and labels."""
        rows = slice(latents.start, latents.stop)
        both, labels = self._both(latents)
        fires = self.n_fires[:, rows]
        f1 = 2 * both[0] / (fires[0][:, None] + self.n_bears[0]).clamp_min(1)
        best, chosen = f1.max(1) if self.c else (f1.sum(1), torch.zeros(len(f1)).long())
        given = chosen.where(best > 0, NO_CONCEPT)
        hits = both[1].gather(1, chosen[:, None])[:, 0] if self.c else best
        bears = self.n_bears[1][chosen] if self.c else best
        usable = (given >= 0) & (fires[1] > 0) & (bears > 0)
        return (
            given,
            *(
                part.where(usable, torch.nan)
                for part in (
                    hits / fires[1],
                    hits / bears,
                    bears / self.n[1],
                    fires[1] / self.n[1],
                )
            ),
            self._effective_concepts(labels if by_label else both.sum(0), fires.sum(0), by_label),
            _effective(labels),
        )

    def by_quarter(self, chosen: Tensor) -> Tensor:
        """Return the specificity in each quarter of a latent's firings on the scored half."""
        is_in = self.rows.halves[self.row] == 1
        row, latent = self.row[is_in], self.latent[is_in]
        given = chosen[latent]
        hit = (self.rows.concepts[row] == given[:, None]).any(1) & (given >= 0)
        n = self.n_fires[1].long()
        quarter = QUARTERS * rank_in_run(latent) // n[latent]
        at = quarter * self.m + latent
        found = _counts(at[hit], QUARTERS, self.m) / _counts(at, QUARTERS, self.m)
        return found.where((n >= MIN_FIRINGS) & (chosen >= 0), torch.nan)

    def _both(self, latents: range) -> tuple[Tensor, Tensor]:
        """Return rows in which latent and concept are on, (2, m', c), and by first concept."""
        ends = torch.searchsorted(self.latent, torch.tensor([latents.start, latents.stop])).tolist()
        row, latent = self.row[slice(*ends)], self.latent[slice(*ends)] - latents.start
        concepts, half = self.rows.concepts[row], self.rows.halves[row]
        place = (half * len(latents) + latent) * self.c
        shape = (HALVES, len(latents) * self.c)
        at = (place[:, None] + concepts)[concepts >= 0]
        both = _counts(at, *shape).view(HALVES, len(latents), self.c)
        first = (place + concepts[:, 0])[concepts[:, 0] >= 0]
        return both, _counts(first, *shape).view(HALVES, len(latents), self.c).sum(0)

    def _effective_concepts(self, both: Tensor, fires: Tensor, by_label: bool) -> Tensor:
        bears = self.of_labels if by_label else self.n_bears.sum(0)
        expected = fires[:, None] * (bears / self.n.sum().clamp_min(1))
        is_meant = both > expected + CHANCE * expected.sqrt() + CHANCE
        return _effective((both - expected).where(is_meant, 0.0))


def _counts(places: Tensor, n: int, m: int) -> Tensor:
    return torch.bincount(places, minlength=n * m).double().view(n, m)


def _effective(weights: Tensor) -> Tensor:
    """Return exp of the entropy of each row of weights ≥ 0, (m); NaN where all are 0."""
    total = weights.sum(1, keepdim=True)
    p = weights / total.clamp_min(1e-300)
    found = torch.special.entr(p).sum(1).exp()
    return found.where(total[:, 0] > 0, torch.nan)


def _shuffled_effective(labels: Tensor, n_fires: Tensor, seed: int) -> Tensor:
    """Return `_effective` of as many rows drawn at random, interpolated between powers of two."""
    found = torch.full_like(n_fires, torch.nan)
    fires = n_fires > 0
    if not fires.any() or not labels.sum() > 0:
        return found
    generator = np.random.default_rng(seed)
    shares = (labels / labels.sum()).numpy()
    sizes = 2 ** np.arange(0, int(np.log2(float(n_fires.max()))) + 2)
    drawn = [generator.multinomial(int(size), shares, size=8) for size in sizes]
    logs = [float(_effective(torch.from_numpy(d).double()).log().mean()) for d in drawn]
    x = n_fires[fires].log2().numpy()
    found[fires] = torch.from_numpy(np.exp(np.interp(x, np.arange(len(sizes)), logs)))
    return found
