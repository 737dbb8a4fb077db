"""What a window of text is about, as a unit vector: embedders by name. To add one: a row here, its
name in `config.EmbedderName`.

An embedder should know nothing of the dictionary. hashed_ngrams and minilm read the words alone;
another layer of the same model shares what the model has in common with itself, so its scores are
higher for every dictionary, for random ones too: compare within one embedder only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sae.config import EmbedderName, EvalConfig
from sae.evals.interface import ContextBatch
from sae.evals.numbers import mixed
from sae.evals.text_windows import NO_TOKEN, TextWindows
from sae.stream.hookpoints import find_hookpoint
from sae.stream.reader import Reader
from sae.stream.sentence_encoder import SentenceEncoder

if TYPE_CHECKING:
    from sae.stream.language_model import LanguageModel

HASHED_WIDTH = 512
PAIR_FACTOR = 6364136223846793005


class Embedder(Protocol):
    """Gives windows their vectors."""

    def __call__(self, windows: TextWindows, batch: ContextBatch) -> Tensor:
        """Return (w, width) vectors of length 1, or 0 where there is nothing to say."""
        ...


class HashedNgrams:
    """Counts of words' pieces and of adjacent pairs, hashed with signs into HASHED_WIDTH columns.

    A token counts as its text without surrounding space and capitals, so that `The` and ` the` are
    one; a token that is space alone counts as nothing.
    Source: Weinberger et al. 2009, "Feature hashing for large scale multitask learning".
    """

    def __init__(self, _settings: EvalConfig) -> None:
        self._words = torch.zeros(0, dtype=torch.int64)

    def __call__(self, windows: TextWindows, batch: ContextBatch) -> Tensor:
        if batch.lm is not None and not len(self._words):
            size = max(batch.lm.vocabulary_size, len(batch.lm.tokenizer))
            self._words = torch.full((size,), -1, dtype=torch.int64)
        word = self._words_of(windows.tokens, batch.lm)
        pair = mixed(word[:, :-1] * PAIR_FACTOR + word[:, 1:])
        has_pair = (word[:, :-1] != 0) & (word[:, 1:] != 0)
        grams = torch.cat([word, pair.where(has_pair, 0)], 1)
        sign = torch.where((grams >> 40) & 1 == 1, 1.0, -1.0).where(grams != 0, 0.0)
        vectors = torch.zeros(len(word), HASHED_WIDTH, device=word.device)
        vectors.scatter_add_(1, grams & (HASHED_WIDTH - 1), sign)
        return torch.nn.functional.normalize(vectors, dim=1)

    def _words_of(self, tokens: Tensor, lm: LanguageModel | None) -> Tensor:
        """Return each token's hash, (w, size); 0 for none. Each token is decoded once."""
        if lm is None:
            return tokens.new_zeros(tokens.shape)
        ids = tokens.clamp_min(0)
        known = self._words.to(tokens.device)
        new = ids[known[ids] == -1].unique()
        if len(new):
            texts = lm.tokenizer.batch_decode(new[:, None].tolist())
            hashes = [zlib.crc32(text.strip().lower().encode()) for text in texts]
            self._words[new.cpu()] = mixed(torch.tensor(hashes)).where(
                torch.tensor([bool(text.strip()) for text in texts]), 0
            )
            known = self._words.to(tokens.device)
        return known[ids].where(tokens != NO_TOKEN, 0)


class Sentences:
    """all-MiniLM-L6-v2's vector of the window's text."""

    def __init__(self, _settings: EvalConfig) -> None:
        self._encode = sentence_encoder()

    def __call__(self, windows: TextWindows, batch: ContextBatch) -> Tensor:
        if batch.lm is None:
            return torch.zeros(len(windows.tokens), self._encode.width)
        ids = [[i for i in row if i != NO_TOKEN] for row in windows.tokens.tolist()]
        return self._encode(batch.lm.tokenizer.batch_decode(ids)).to(windows.tokens.device)


class Layer:
    """The mean of the model's own activations at `eval.embedder_layer` over a window's tokens."""

    def __init__(self, settings: EvalConfig) -> None:
        self._layer = settings.embedder_layer
        self._reader: Reader | None = None

    def __call__(self, windows: TextWindows, batch: ContextBatch) -> Tensor:
        if batch.lm is None or self._layer is None:
            return torch.zeros(len(windows.tokens), 1)
        if self._reader is None:
            place = find_hookpoint(batch.lm.module, self._layer)
            self._reader = Reader(batch.lm, [place])
        states = self._reader.read(batch.contexts.tokens)[0].flatten(0, 1).float()
        states = states.to(windows.tokens.device)
        is_in = windows.window_of >= 0
        sums = states.new_zeros(len(windows.tokens), states.shape[1])
        sums.index_add_(0, windows.window_of[is_in], states[is_in])
        return torch.nn.functional.normalize(sums, dim=1)


@cache
def sentence_encoder() -> SentenceEncoder:
    """Return the one sentence encoder of the process."""
    return SentenceEncoder("cuda" if torch.cuda.is_available() else "cpu")


EMBEDDERS: dict[EmbedderName, Callable[[EvalConfig], Embedder]] = {
    "hashed_ngrams": HashedNgrams,
    "minilm": Sentences,
    "layer": Layer,
}
