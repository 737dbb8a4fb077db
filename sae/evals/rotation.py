"""The permutation of codes shuffled in time: every token gets the code of one long before it.

The contexts of an evaluation, in the order of the stream, are one circle of n tokens. With S the
tokens of the first contexts that hold at least LAG_TOKENS,
    token i is given the code of token i − S   (of token i − S + n, for the first S)
and where n < 2 S, so that the circle would close too soon, of token i + n // 2.

This is a permutation: every code is used once, so that L0 and all firing rates and magnitudes are
those of the dictionary, to the last digit. Contexts are cut by whole rows, so that the permutation
is a function of the stream alone, whatever the batch size; the sums that it feeds obey every law of
accumulators. It is one permutation of a stream: the same contexts in another order, or divided
among processes (each turns its own share), are given another one of the same kind.

Why not within a batch, or within a context: the first would depend on the batch size; the second
would leave latents of a topic in their own document, where they are half right.
Memory: the first 2 S tokens' activations, then those of S, and their codes.
Cannot destroy: what tokens S apart have in common, such as latents that fire on nearly all.
"""

from __future__ import annotations

import torch

from sae.coder.latents import Latents, joined
from sae.evals.inputs import limited, rows_of
from sae.evals.nulls import split
from sae.stream.contexts import CapturedContexts, Contexts

LAG_TOKENS = 4096

Piece = tuple[CapturedContexts, Latents]
"""Contexts, and a code (n, k) for each of their unmasked tokens."""
NO_CODES = Latents(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64))


class Rotation:
    """Take contexts with their codes in order, give them back with others' codes.

    Attributes:
        first: once finished, the codes that the first tokens were given, in order.
    """

    def __init__(self) -> None:
        self._early: list[Piece] = []
        self._n_early = self._lag = 0
        self._is_turning = False
        self._held: list[CapturedContexts] = []
        self._waiting = NO_CODES
        self.first: Latents | None = None

    def add(self, contexts: CapturedContexts, latents: Latents) -> list[Piece]:
        """Take contexts with their own codes; return what can be given codes already."""
        if self._is_turning:
            return self._turned(contexts, latents)
        self._early.append((contexts, latents))
        self._n_early += n_tokens(contexts)
        self._lag += self._n_first_of(contexts, LAG_TOKENS - self._lag)
        if self._lag < LAG_TOKENS or self._n_early < 2 * self._lag:
            return []
        early, self._early, self._is_turning = self._early, [], True
        return [piece for one in early for piece in self._turned(*one)]

    def finish(self) -> list[Piece]:
        """Return the first contexts, with the codes that are left."""
        if not self._is_turning:
            self._held = [contexts for contexts, _ in self._early]
            self._waiting = self._behind(*(code for _, code in self._early))
            shift = -(len(self._waiting.values) // 2)
            self._waiting = Latents(*(part.roll(shift, 0) for part in self._waiting))
        self.first = self._waiting
        return [(contexts, self._taken(n_tokens(contexts))) for contexts in self._held]

    def _turned(self, contexts: CapturedContexts, latents: Latents) -> list[Piece]:
        """Hold the first contexts back, give the others the codes that wait."""
        self._waiting = self._behind(latents)
        missing = self._lag - sum(map(n_tokens, self._held))
        n_rows = 0
        if missing > 0:
            n_rows = len(next(limited([contexts], missing)).tokens)
            self._held.append(rows_of(contexts, slice(0, n_rows)))
        rest = rows_of(contexts, slice(n_rows, None))
        return [(rest, self._taken(n_tokens(rest)))] if len(rest.tokens) else []

    def _behind(self, *codes: Latents) -> Latents:
        """Return the codes that wait with `codes` behind them, on their device."""
        waiting = [self._waiting] if len(self._waiting.values) else []
        return joined([*waiting, *codes]) if codes else self._waiting

    def _taken(self, n: int) -> Latents:
        given, self._waiting = split(self._waiting, n)
        return given

    @staticmethod
    def _n_first_of(contexts: CapturedContexts, missing: int) -> int:
        """Return how many tokens the first rows hold that bring `missing` ones."""
        return sum(n_tokens(part) for part in limited([contexts], missing))


def n_tokens(contexts: Contexts) -> int:
    """Return how many tokens are not masked."""
    return int(contexts.is_kept.sum())
