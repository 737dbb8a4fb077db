"""Texts and codes whose latents are known: latent j fires on the word j alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from sae.coder.latents import Latents
from sae.config import EvalConfig
from sae.evals.interface import ContextBatch, EvalSetup
from sae.stream.contexts import CapturedContexts

N_WORDS = 60
D_SAE = 40
CONTEXT_SIZE = 40
SETTINGS = EvalConfig(judge_latents=D_SAE, judge_examples=12)
SETUP = EvalSetup(d_in=1, d_sae=D_SAE, seed=0, n_resamples=200, settings=SETTINGS)


class WordTokenizer:
    """A token is a word of its own, with a space before it."""

    def encode(self, *_: str, **__: bool) -> list[int]:
        return [0]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" w{i}" for i in ids)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f" w{i}" for i in ids]


LM = cast(Any, SimpleNamespace(tokenizer=WordTokenizer()))


def text_batch(n: int = 400, seed: int = 0, shuffle: bool = False, lm: Any = LM) -> ContextBatch:
    """Return n documents of random words; with `shuffle` every token has another token's code."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / (torch.arange(N_WORDS) + 8.0)
    tokens = torch.multinomial(weights.expand(n, -1), CONTEXT_SIZE, True, generator=generator)
    ids = torch.arange(n)[:, None].expand(n, CONTEXT_SIZE) + 1000 * seed
    is_kept = torch.ones_like(tokens, dtype=torch.bool)
    is_kept[:, 0] = False
    kept = is_kept.flatten().nonzero()[:, 0]
    words = tokens.flatten()[kept]
    if shuffle:
        words = words[torch.randperm(len(words), generator=generator)]
    has_latent = words < D_SAE - 2  # the last two latents are dead
    latents = Latents((1.0 + words / 100) * has_latent, words.clamp(max=D_SAE - 1))
    code = Latents(*(part[:, None] for part in latents))
    captured = CapturedContexts(tokens, ids, is_kept, torch.zeros(n, CONTEXT_SIZE, 1))
    return ContextBatch(captured, code, kept, lm)


def part_of(batch: ContextBatch, rows: slice) -> ContextBatch:
    """Return some of a batch's contexts with their code."""
    n = len(batch.contexts.tokens)
    chosen = torch.arange(n)[rows]
    contexts = CapturedContexts(
        *(
            getattr(batch.contexts, name)[rows]
            for name in ("tokens", "document_ids", "is_kept", "activations")
        )
    )
    is_in = torch.isin(batch.kept // CONTEXT_SIZE, chosen)
    code = Latents(*(part[is_in] for part in batch.latents))
    kept = batch.kept[is_in] - int(chosen[0]) * CONTEXT_SIZE
    return ContextBatch(contexts, code, kept, batch.lm)
