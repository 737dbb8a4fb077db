"""Which texts a judge will see of a few latents, chosen in one pass and in bounded memory.

The one idea: every token has a number (`numbers`), and the lowest so far are a uniform sample.

Documents fall into two halves by a hash of their id: an explanation is made from the one (half 0)
and tested on the other (half 1). Of each latent and half are kept, one text a document,
    the `n_strongest` texts with its largest activations, and
    the `n_sampled` texts with the lowest numbers among the tokens on which it fires;
and of each half a pool of `n_pool` texts around any token, with which of the latents fire in them.
A text is a window of tokens around its token, cut where the context or the document ends.

Memory: about (4 (n_strongest + n_sampled) window · 8 + 4 n_pool) bytes a latent that is looked at,
whatever d_sae and the number of tokens are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.interface import ContextBatch
from sae.evals.numbers import HALVES, halves_of, token_numbers

LEFT, RIGHT = 20, 11
WINDOW = LEFT + 1 + RIGHT
NO_TOKEN = -1
CHUNK = 256


class Windows(NamedTuple):
    """Texts of r tokens' surroundings, each of a group (a latent's half, or a pool's).

    Shapes: groups, documents, numbers (r) int64; keys (r) float64, the largest are kept; tokens
    (r, WINDOW) int32, NO_TOKEN outside; activations (r, WINDOW); fires (r, n_latents) bool, empty
    but in pools.
    """

    groups: Tensor
    documents: Tensor
    numbers: Tensor
    keys: Tensor
    tokens: Tensor
    activations: Tensor
    fires: Tensor

    @classmethod
    def empty(cls, n_latents: int = 0) -> Windows:
        """Return none."""
        none = torch.zeros(0, dtype=torch.int64)
        wide = torch.zeros(0, WINDOW)
        fires = torch.zeros(0, n_latents, dtype=torch.bool)
        return cls(none, none, none, none.double(), wide.int(), wide, fires)


def best(windows: Windows, n: int, *, one_a_document: bool = True) -> Windows:
    """Return the `n` of largest key of each group, largest first, groups in order."""
    order = best_rows(windows, n, one_a_document)
    return Windows(*(part[order] for part in windows))


def best_rows(windows: Windows, n: int, one_a_document: bool) -> Tensor:
    """Return which rows `best` keeps; equal keys are told apart by the tokens' numbers."""
    order = windows.numbers.argsort(stable=True)
    order = order[windows.keys[order].argsort(descending=True, stable=True)]
    if one_a_document:
        order = order[windows.documents[order].argsort(stable=True)]
        order = order[windows.groups[order].argsort(stable=True)]
        groups, documents = windows.groups[order], windows.documents[order]
        is_first = torch.ones(len(order), dtype=torch.bool)
        is_first[1:] = (groups[1:] != groups[:-1]) | (documents[1:] != documents[:-1])
        order = order[is_first]
        order = order[windows.numbers[order].argsort(stable=True)]
        order = order[windows.keys[order].argsort(descending=True, stable=True)]
    order = order[windows.groups[order].argsort(stable=True)]
    return order[rank_in_run(windows.groups[order]) < n]


class Sampler:
    """The running samples of some latents.

    Args:
        latents: (l) int64, those looked at. seed: of the tokens' numbers and the halves.
    """

    def __init__(
        self, latents: Tensor, d_sae: int, seed: int, n_strongest: int, n_sampled: int, n_pool: int
    ) -> None:
        self.latents, self.seed = latents, seed
        self.n_strongest, self.n_sampled, self.n_pool = n_strongest, n_sampled, n_pool
        self.slots = torch.full((d_sae,), -1, dtype=torch.int64)
        self.slots[latents] = torch.arange(len(latents))
        self.strongest, self.sampled = Windows.empty(), Windows.empty()
        self.pool = Windows.empty(len(latents))

    def update(self, batch: ContextBatch) -> None:
        """Add a batch of contexts."""
        view = _View(batch, self.slots, self.seed)
        if not len(view.kept):
            return
        rows, columns = ((view.slots >= 0) & (view.values != 0)).nonzero(as_tuple=True)
        if len(rows):
            values = view.values[rows, columns].abs().double()
            group = view.slots[rows, columns] * HALVES + view.halves[rows]
            light = view.light(rows, group, values)
            strongest = best_rows(light, self.n_strongest, True)
            uniform = light._replace(keys=-light.numbers.double())
            sampled = best_rows(uniform, self.n_sampled, True)
            new = (view.filled(light, rows, strongest), view.filled(uniform, rows, sampled))
            self._add(new[0], new[1], Windows.empty(len(self.latents)))
        self._add_to_pool(view)

    def merge(self, other: Sampler) -> None:
        """Add what `other` saw."""
        self._add(other.strongest, other.sampled, other.pool)

    def _add_to_pool(self, view: _View) -> None:
        rows = torch.arange(len(view.kept))
        light = view.light(rows, view.halves, -view.numbers.double())
        chosen = best_rows(light, self.n_pool, False)
        worst = self._worst_of_pool()
        chosen = chosen[light.keys[chosen] >= worst[light.groups[chosen]]]
        pool = view.filled(light, rows, chosen)
        fires = view.fires_in(view.kept[rows[chosen]], len(self.latents))
        silent = torch.zeros_like(pool.activations)
        new = pool._replace(fires=fires, activations=silent)
        self._add(Windows.empty(), Windows.empty(), new)

    def _worst_of_pool(self) -> Tensor:
        worst = torch.full((HALVES,), -torch.inf, dtype=torch.float64)
        for half in range(HALVES):
            keys = self.pool.keys[self.pool.groups == half]
            if len(keys) >= self.n_pool:
                worst[half] = keys.min()
        return worst

    def _add(self, strongest: Windows, sampled: Windows, pool: Windows) -> None:
        self.strongest = best(_joined(self.strongest, strongest), self.n_strongest)
        self.sampled = best(_joined(self.sampled, sampled), self.n_sampled)
        self.pool = best(_joined(self.pool, pool), self.n_pool, one_a_document=False)


class _View:
    """A batch as the sampler reads it, on the CPU: the n tokens that count, and their numbers."""

    def __init__(self, batch: ContextBatch, slots: Tensor, seed: int) -> None:
        contexts = batch.contexts
        self.tokens = contexts.tokens.cpu()
        self.all_documents = contexts.document_ids.cpu()
        self.kept = batch.kept.cpu()
        code = Latents(*(part.cpu() for part in batch.latents))
        self.slots, self.values = slots[code.indices], code.values.float()
        self.documents = self.all_documents.flatten()[self.kept]
        self.halves = halves_of(self.documents, seed)
        self.numbers = token_numbers(contexts, self.kept, seed)
        self.row_of = torch.full((self.tokens.numel(),), -1, dtype=torch.int64)
        self.row_of[self.kept] = torch.arange(len(self.kept))

    def light(self, rows: Tensor, groups: Tensor, keys: Tensor) -> Windows:
        """Return records of kept tokens `rows` whose texts are not filled in yet."""
        return Windows.empty()._replace(
            groups=groups, documents=self.documents[rows], numbers=self.numbers[rows], keys=keys
        )

    def filled(self, light: Windows, rows: Tensor, chosen: Tensor) -> Windows:
        """Return the `chosen` records with their texts and their latent's activations."""
        at = self.kept[rows[chosen]]
        flat, is_inside = self._around(at)
        tokens = self.tokens.flatten()[flat].masked_fill(~is_inside, NO_TOKEN).int()
        wanted = light.groups[chosen] // HALVES
        activations = torch.zeros(len(at), WINDOW)
        for part in torch.arange(len(at)).split(CHUNK):
            values, slots = self._codes(flat[part], is_inside[part])
            mine = slots == wanted[part, None, None]
            activations[part] = values.where(mine, 0.0).sum(-1)
        return light._replace(
            groups=light.groups[chosen],
            documents=light.documents[chosen],
            numbers=light.numbers[chosen],
            keys=light.keys[chosen],
            tokens=tokens,
            activations=activations,
            fires=torch.zeros(len(chosen), 0, dtype=torch.bool),
        )

    def fires_in(self, at: Tensor, n_latents: int) -> Tensor:
        """Return which latents fire in the windows around flat positions `at`, (r, n_latents)."""
        fires = torch.zeros(len(at), n_latents + 1, dtype=torch.bool)
        for part in torch.arange(len(at)).split(CHUNK):
            values, slots = self._codes(*self._around(at[part]))
            lit = slots.where((slots >= 0) & (values != 0), n_latents)
            fires[part] = fires[part].scatter_(1, lit.flatten(1), True)
        return fires[:, :n_latents]

    def _codes(self, flat: Tensor, is_inside: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and slots (r, WINDOW, k) at `flat` (r, WINDOW); slot −1 where masked."""
        rows = self.row_of[flat]
        is_coded = (is_inside & (rows >= 0))[..., None]
        rows = rows.clamp_min(0)
        return self.values[rows].where(is_coded, 0.0), self.slots[rows].where(is_coded, -1)

    def _around(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the windows' flat positions, and which of them are of the token's document."""
        width = self.tokens.shape[1]
        offsets = torch.arange(-LEFT, RIGHT + 1)
        place = (at % width)[:, None] + offsets
        flat = (at[:, None] + offsets).clamp(0, self.tokens.numel() - 1)
        documents = self.all_documents.flatten()
        same = documents[flat] == documents[at][:, None]
        return flat, same & (place >= 0) & (place < width)


def _joined(first: Windows, second: Windows) -> Windows:
    return Windows(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


def rank_in_run(sorted_ids: Tensor) -> Tensor:
    """Return each element's place in its run of equal ids, counted from 0, (p)."""
    place = torch.arange(len(sorted_ids), device=sorted_ids.device)
    starts = torch.ones_like(sorted_ids, dtype=torch.bool)
    starts[1:] = sorted_ids[1:] != sorted_ids[:-1]
    return place - torch.cummax(place.where(starts, 0), 0).values if len(place) else place
