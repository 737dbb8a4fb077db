"""Which latents stand for a concept, and what happens to them where a more special one is there.

With a unit direction g of each concept, decoder rows d, encoder rows e and codes z:
    main latents  the set whose union (any of them fires) detects the concept best on training rows:
                  the latent of best F1, then one more for as long as that adds SPLIT_GAIN and half
                  of the rows that it adds are the concept's; without latents that detect one of its
                  children better than the concept
    detected      on test rows the main latents fire in at least DETECTED of the concept's rows with
                  none of its children, and in at most FALSE_ALARMS of the rows without it
    recall_off, recall_on   share of a concept's rows in which they fire, with none of its
                  children, and with a child (mean over children); drop = recall_off − recall_on
    full          share of a concept's rows that its direction tells (`says`), in which no main
                  latent fires and another latent j has cos(d_j, g) ≥ LEAST_COSINE and writes at
                  least LEAST_SHARE of the row's projection, z_j d_j·g ≥ LEAST_SHARE · x·g
    leak          cos(d_child, g_concept), of a child's best latent, where that is none of the
                  concept's main latents: it writes its parent
    hole          cos(e_concept, g_child): the parent's latent is told to be silent for the child
    hedging       cos(d_concept, g_child): the parent's latent writes the child too
    latents       number of main latents: above 1 the concept is split
All but recall_off and the share detected count detected concepts alone: what finds nothing cannot
absorb anything, so that a useless dictionary gets no value, not 0.

Source: Chanin et al. 2024, "A is for absorption" (arXiv 2409.14507: splitting by a gain of 0.03 in
F1, absorption by 0.025 and 0.4); Chanin et al. 2025, "Feature hedging" (arXiv 2505.11756).
Deviations: the union of latents in place of a probe on them; a child's own latents never stand for
its parent, or a parent that all its children absorb would look split; rows without the concept must
be quiet too, or latents that always fire would count as detecting everything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.coder.latents import Latents

DETECTED, FALSE_ALARMS = 0.7, 0.1
SPLIT_GAIN, MOST_LATENTS = 0.03, 8
LEAST_COSINE, LEAST_SHARE = 0.025, 0.4
LEAST_ROWS = 8
COLUMNS = ("recall_off", "recall_on", "full", "leak", "hole", "hedging", "latents", "is_detected")


class Rows(NamedTuple):
    """Rows of concepts and their children.

    Attributes:
        latents: (n, k) each. is_on: (n, concepts) bool. is_child: (n, children) bool.
        along: (n, concepts), projections on the concepts' directions. says: (n, concepts) bool.
        is_train: (n) bool.
    """

    latents: Latents
    is_on: Tensor
    is_child: Tensor
    along: Tensor
    says: Tensor
    is_train: Tensor


class Directions(NamedTuple):
    """Unit directions, (concepts, d) and (children, d), and the dictionary's rows, (m, d)."""

    concepts: Tensor
    children: Tensor
    decoder: Tensor
    encoder: Tensor | None


def judged(rows: Rows, pairs: Tensor, directions: Directions) -> tuple[Tensor, list[list[int]]]:
    """Return each concept's values (concepts, len(COLUMNS)) float64, and its main latents.

    NaN where a concept has none. Shapes: pairs (p, 2) int64, concept and child.
    """
    d_sae = len(directions.decoder)
    train, test = (_part(rows, chosen) for chosen in (rows.is_train, ~rows.is_train))
    child_mains = [main_latents(train.latents, on, d_sae, most=1) for on in train.is_child.T]
    mains = [
        main_latents(train.latents, on, d_sae, train.is_child[:, pairs[pairs[:, 0] == concept, 1]])
        for concept, on in enumerate(train.is_on.T)
    ]
    reads = directions.decoder @ directions.concepts.T
    table = torch.full((len(mains), len(COLUMNS)), torch.nan, dtype=torch.float64)
    for concept, main in enumerate(mains):
        children = pairs[pairs[:, 0] == concept, 1]
        fires = _any_fires(test.latents, main)
        found = _recalls(test, concept, children, fires)
        found["is_detected"] = _is_detected(found, test.is_on[:, concept], fires)
        if found["is_detected"] == 1:
            found["latents"] = float(len(main))
            of_concept = (main, fires, reads[:, concept])
            found["full"] = _full_absorption(test, concept, *of_concept, directions)
            firsts = [one[0] for child in children for one in [child_mains[int(child)]] if one]
            own = [latent for latent in firsts if latent not in main]
            found |= _cosines(concept, main[0], children, own, directions)
        row = [found.get(name, torch.nan) for name in COLUMNS]
        table[concept] = torch.tensor(row, dtype=torch.float64)
    return table, mains


def main_latents(
    latents: Latents,
    on: Tensor,
    d_sae: int,
    children: Tensor | None = None,
    most: int = MOST_LATENTS,
) -> list[int]:
    """Return the latents whose union detects `on` (n) best, best first; none where it never is.

    Latents that detect one of the `children` (n, c) better are left out.
    """
    n_on = int(on.sum())
    if n_on < LEAST_ROWS:
        return []
    is_free = torch.ones(d_sae, dtype=torch.bool)
    if children is not None:
        own = _f1(latents, on, d_sae)
        for child in children.T:
            is_free &= _f1(latents, child, d_sae) <= own
    left = torch.ones_like(on)
    chosen: list[int] = []
    hits = alarms = best = 0.0
    while len(chosen) < most:
        new_hits = _fire_counts(latents, left & on, d_sae)
        new_alarms = _fire_counts(latents, left & ~on, d_sae)
        f1 = 2 * (hits + new_hits) / (n_on + hits + new_hits + alarms + new_alarms)
        if chosen:
            is_free &= new_hits >= new_alarms
        latent = int(f1.where(is_free, 0.0).argmax())
        if not is_free[latent] or float(f1[latent]) - best < SPLIT_GAIN:
            break
        chosen.append(latent)
        best = float(f1[latent])
        hits, alarms = hits + float(new_hits[latent]), alarms + float(new_alarms[latent])
        left &= ~_any_fires(latents, [latent])
    return chosen


def _f1(latents: Latents, on: Tensor, d_sae: int) -> Tensor:
    """Return each latent's F1 as a detector of `on` (n), (d_sae) float64."""
    hits, fires = (_fire_counts(latents, rows, d_sae) for rows in (on, torch.ones_like(on)))
    return 2 * hits / (fires + on.sum()).clamp_min(1)


def _part(rows: Rows, chosen: Tensor) -> Rows:
    latents = Latents(*(part[chosen] for part in rows.latents))
    return Rows(latents, *(part[chosen] for part in rows[1:]))


def _fire_counts(latents: Latents, among: Tensor, d_sae: int) -> Tensor:
    values, indices = (part[among] for part in latents)
    indices = indices[values != 0]
    return torch.bincount(indices, minlength=d_sae).double()


def _any_fires(latents: Latents, chosen: list[int]) -> Tensor:
    is_mine = torch.isin(latents.indices, torch.tensor(chosen, dtype=torch.int64))
    return (is_mine & (latents.values != 0)).any(1)


def _recalls(rows: Rows, concept: int, children: Tensor, fires: Tensor) -> dict[str, float]:
    on, child = rows.is_on[:, concept], rows.is_child[:, children]
    alone = on & ~child.any(1)
    both = [on & column for column in child.T]
    recalls = [_share(fires[chosen]) for chosen in both if int(chosen.sum()) >= LEAST_ROWS]
    found = {}
    if int(alone.sum()) >= LEAST_ROWS:
        found["recall_off"] = _share(fires[alone])
        if recalls:
            found["recall_on"] = sum(recalls) / len(recalls)
    return found


def _is_detected(found: dict[str, float], on: Tensor, fires: Tensor) -> float:
    if "recall_off" not in found or bool(on.all()):
        return torch.nan
    return float(found["recall_off"] >= DETECTED and _share(fires[~on]) <= FALSE_ALARMS)


def _full_absorption(
    rows: Rows,
    concept: int,
    main: list[int],
    fires: Tensor,
    reads: Tensor,
    directions: Directions,
) -> float:
    told = rows.is_on[:, concept] & rows.says[:, concept] & (rows.along[:, concept] > 0)
    if not told.any():
        return torch.nan
    cosine = reads / directions.decoder.norm(dim=1).clamp_min(1e-12)
    is_able = cosine >= LEAST_COSINE
    is_able[main] = False
    values, indices = (part[told] for part in rows.latents)
    writes = values * reads[indices] * is_able[indices]
    is_absorbed = (writes >= LEAST_SHARE * rows.along[told, concept, None]).any(1)
    return _share(is_absorbed & ~fires[told])


def _cosines(
    concept: int, main: int, children: Tensor, own: list[int], directions: Directions
) -> dict[str, float]:
    """Return leak of the children's own latents, hole and hedging, means over children."""
    if not len(children):
        return {}
    parent, theirs = directions.concepts[concept], directions.children[children]
    found = {"hedging": _mean_cosine(directions.decoder[[main]], theirs)}
    if own:
        found["leak"] = _mean_cosine(directions.decoder[own], parent[None])
    if directions.encoder is not None:
        found["hole"] = _mean_cosine(directions.encoder[[main]], theirs)
    return found


def _mean_cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double()).mean())


def _share(chosen: Tensor) -> float:
    return float(chosen.double().mean())
