"""A language model whose logits are linear in the activation at `place`, and texts that it knows.

Token v has the embedding e_v; the logits after it are W_U e_v. A dictionary over it whose latent k
fires on token k alone and writes `W_dec[k]` changes the logits by exactly W_U of what it writes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from toy_worlds import gaussian, unit

from sae.evals.evaluable import Evaluable
from sae.evals.replacing import Places
from sae.stream.contexts import CapturedContexts
from sae.stream.hookpoints import Hookpoint
from sae.stream.language_model import LanguageModel

D, N_KEYS, VOCABULARY = 48, 24, 60
PLACE = Places((Hookpoint("place"),))


class NoNorm(nn.Identity):
    """A final norm that does nothing."""


class LinearModel(nn.Module):
    """Embeds, then reads out; there is nothing between."""

    def __init__(self, embedding: Tensor, readout: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(embedding)
        self.place = nn.Identity()
        self.norm = NoNorm()
        self.head = nn.Linear(*readout.T.shape, bias=False)
        self.head.weight = nn.Parameter(readout)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.norm(self.place(self.embed(input_ids)))))


class KeyValueCoder:
    """Latent k fires on token k < N_KEYS with 1 + k / 100; what it writes is `W_dec[k]`."""

    d_in = D

    def __init__(self, embedding: Tensor, W_dec: Tensor) -> None:
        self.embedding, self.W_dec = embedding, W_dec
        self.d_sae = len(W_dec)

    def encode(self, x: Tensor) -> Tensor:
        token = torch.cdist(x.float(), self.embedding).argmin(1)
        sizes = 1 + torch.arange(VOCABULARY) / 100
        dense = torch.nn.functional.one_hot(token, VOCABULARY) * sizes
        return dense[:, : self.d_sae]

    def decode(self, dense: Tensor) -> Tensor:
        return dense @ self.W_dec


def key_value_parts() -> tuple[LanguageModel, Evaluable]:
    """Token k < N_KEYS is followed by token N_KEYS + k, which is what latent k writes."""
    readout = unit(gaussian(VOCABULARY, D, seed=1))
    values = 4.0 * readout[N_KEYS : 2 * N_KEYS]
    embedding = 0.3 * gaussian(VOCABULARY, D, seed=2)
    embedding[:N_KEYS] += values
    module: Any = LinearModel(embedding, readout).eval().requires_grad_(False)
    lm = LanguageModel(module, SimpleNamespace(), "linear")  # type: ignore[arg-type]
    return lm, Evaluable(KeyValueCoder(embedding, values), D)


def key_value_text(lm: LanguageModel, n: int = 96, t: int = 24, seed: int = 0) -> CapturedContexts:
    """Return n documents, a context each: after a key its value, else any token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (n, t), generator=generator)
    for place in range(1, t):
        before = tokens[:, place - 1]
        tokens[:, place] = torch.where(before < N_KEYS, before + N_KEYS, tokens[:, place])
    documents = torch.arange(n)[:, None].expand(n, t).contiguous()
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, 0] = False
    module: Any = lm.module
    return CapturedContexts(tokens, documents, kept, module.embed(tokens))
