"""From samples of tokens to what a judge is shown and asked.

Of each latent: evidence from the documents of half 0; questions from those of half 1.
    detection   n texts in which it fires, uniformly from the tokens on which it does, against n in
                which it is silent: half of them at random, half the nearest to the firing texts
    fuzzing     each of the n firing texts with the tokens on which it fires marked, against the
                same text with as many others marked, at places drawn by the text's own number
Nearest: by the cosine of their tokens' counts, weighted by log(texts / texts with the token).
Source: Paulo et al. 2024 (arXiv 2410.13928, detection and fuzzing); our deviation: what explains
and what is asked about never share a document.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae.evals.judging.judge import Evidence, Example
from sae.evals.judging.sampling import HALVES, NO_TOKEN, Sampler, Windows
from sae.stream.vocabulary import token_texts

MIN_EXAMPLES = 4
BAG_WIDTH = 4096
SPREAD = 2_654_435_761


@dataclass(frozen=True)
class Questions:
    """What is asked of one latent: texts to explain, and pairs of lists that score apart."""

    evidence: Evidence
    firing: tuple[Example, ...]
    silent: tuple[Example, ...]
    marked: tuple[Example, ...]
    mismarked: tuple[Example, ...]


class Examiner:
    """Makes the questions of any of a sampler's latents.

    Args:
        tokenizer: turns token ids into text. n_examples: the most texts of each kind.
    """

    def __init__(self, sampler: Sampler, tokenizer: Any, n_examples: int) -> None:
        self.sampler, self.n_examples = sampler, n_examples
        ids = _used_ids(sampler)
        self.texts = dict(zip(ids, token_texts(tokenizer, ids), strict=True))
        self.pools = [_where(sampler.pool, half) for half in range(HALVES)]
        self.bags = _bags(self.pools[1].tokens)
        self.rarity = _rarity(self.bags)

    def questions(self, slot: int) -> Questions | None:
        """Return what is asked of latent number `slot`; None where too few documents fire."""
        shown = self._evidence_windows(slot)
        firing = self._firing_windows(slot)
        if not len(shown.groups) or len(firing.groups) < MIN_EXAMPLES:
            return None
        silent = self._silent_windows(slot, firing)
        if len(silent.groups) < MIN_EXAMPLES:
            return None
        background = self._without(self.pools[0], slot)
        examples = self._examples(firing)
        pairs = [(e, _mismarked(e, int(n))) for e, n in zip(examples, firing.numbers, strict=True)]
        both = [(with_marks(e, e.firing), wrong) for e, wrong in pairs if wrong is not None]
        return Questions(
            Evidence(self._examples(shown), self._examples(_first(background, self.n_examples))),
            tuple(_plain(example) for example in examples),
            tuple(_plain(example) for example in self._examples(silent)),
            tuple(right for right, _ in both),
            tuple(wrong for _, wrong in both),
        )

    def _evidence_windows(self, slot: int) -> Windows:
        """Return the strongest texts of half 0, then uniformly chosen ones of other documents."""
        group = slot * HALVES
        strongest = _first(_where(self.sampler.strongest, group), self.n_examples // 2)
        sampled = _where(self.sampler.sampled, group)
        is_new = ~torch.isin(sampled.documents, strongest.documents)
        rest = Windows(*(part[is_new] for part in sampled))
        rest = _first(rest, self.n_examples - len(strongest.groups))
        return Windows(*(torch.cat(pair) for pair in zip(strongest, rest, strict=True)))

    def _firing_windows(self, slot: int) -> Windows:
        return _first(_where(self.sampler.sampled, slot * HALVES + 1), self.n_examples)

    def _silent_windows(self, slot: int, firing: Windows) -> Windows:
        """Return as many texts in which the latent is silent: the nearest and random ones."""
        n = len(firing.groups)
        is_silent = ~self.pools[1].fires[:, slot]
        is_silent &= ~torch.isin(self.pools[1].documents, firing.documents)
        candidates = is_silent.nonzero()[:, 0]
        near = (
            _unit(self.bags[candidates] * self.rarity) @ _unit(_bags(firing.tokens) * self.rarity).T
        )
        hard = candidates[_one_each(near, n // 2)]
        rest = candidates[~torch.isin(candidates, hard)][: n - len(hard)]
        return Windows(*(part[torch.cat([hard, rest])] for part in self.pools[1]))

    def _without(self, pool: Windows, slot: int) -> Windows:
        return Windows(*(part[~pool.fires[:, slot]] for part in pool))

    def _examples(self, windows: Windows) -> tuple[Example, ...]:
        rows = zip(windows.tokens.tolist(), windows.activations.tolist(), strict=True)
        return tuple(self._example(tokens, activations) for tokens, activations in rows)

    def _example(self, tokens: list[int], activations: list[float]) -> Example:
        inside = [place for place, token in enumerate(tokens) if token != NO_TOKEN]
        return Example(
            tuple(self.texts[tokens[place]] for place in inside),
            tuple(activations[place] for place in inside),
        )


def with_marks(example: Example, marked: tuple[int, ...]) -> Example:
    """Return the text with marks and without activations, which a question must not show."""
    return Example(example.tokens, marked=marked)


def _plain(example: Example) -> Example:
    return Example(example.tokens)


def _mismarked(example: Example, number: int) -> Example | None:
    """Return the text with as many silent tokens marked; None where there are not as many."""
    firing = set(example.firing)
    silent = [place for place in range(len(example.tokens)) if place not in firing]
    if len(silent) < len(firing):
        return None
    drawn = random.Random(number).sample(silent, len(firing))
    return with_marks(example, tuple(sorted(drawn)))


def _used_ids(sampler: Sampler) -> list[int]:
    parts = (sampler.strongest, sampler.sampled, sampler.pool)
    ids = torch.cat([part.tokens.flatten() for part in parts]).unique()
    return [i for i in ids.tolist() if i != NO_TOKEN]


def _where(windows: Windows, group: int) -> Windows:
    chosen = windows.groups == group
    return Windows(*(part[chosen] for part in windows))


def _first(windows: Windows, n: int) -> Windows:
    return Windows(*(part[:n] for part in windows))


def _bags(tokens: Tensor) -> Tensor:
    """Return how often each (hashed) token is in each text, (r, BAG_WIDTH)."""
    bags = torch.zeros(len(tokens), BAG_WIDTH)
    columns = (tokens.long() * SPREAD) % BAG_WIDTH
    return bags.scatter_add_(1, columns, (tokens != NO_TOKEN).float())


def _rarity(bags: Tensor) -> Tensor:
    n_with = (bags > 0).sum(0)
    return ((len(bags) + 1) / (n_with + 1)).log()


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _one_each(near: Tensor, n: int) -> Tensor:
    """Return up to n different rows of near (candidates, firing): each text's nearest in turn."""
    chosen: list[int] = []
    near = near.clone()
    for column in range(min(n, near.shape[1], near.shape[0])):
        row = int(near[:, column].argmax())
        chosen.append(row)
        near[row] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64)
