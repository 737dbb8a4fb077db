"""A judge that goes by likeness: an explanation is a few texts, and what is like them fits.

It explains by quoting, of the texts in which the latent fires, the N_QUOTED stretches around its
tokens that lie nearest to the centroid of the others, less that of stretches without it: a list
such as
    ["a dog ran home", "my dog slept"]
A text scores the largest cosine of any of its stretches with the mean of the quoted ones, marked
tokens the mean of theirs. Words that are no such list are embedded as they are, so that it can
apply what others wrote. A stretch is a token with REACH on each side.

What embeds is a function of texts: `eval.embedder` minilm's sentence encoder, else hashed words and
pairs of words. Both are deterministic and offline.
Source: ours; explanations as nearest texts after Bills et al. 2023, "Language models can explain
neurons in language models" (nearest-neighbour simulation).
Cost: about 12 stretches a text; a fraction of a second a latent by hashed n-grams.
Cannot see: what is not in the few words around a token; order beyond pairs.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sae.config import EvalConfig
from sae.evals.embedders import sentence_encoder
from sae.evals.judging.judge import Confidence, Evidence, Example

REACH = 2
STRIDE = 2
N_QUOTED = 8
WIDTH = 1024
Embed = Callable[[Sequence[str]], Tensor]


class SimilarityJudge:
    """The judge of this module.

    Args:
        embed: gives texts unit vectors, (n, width). name: as what it signs.
    """

    n_at_once = 1

    def __init__(self, embed: Embed | None = None, name: str = "similarity") -> None:
        self.embed, self.name = hashed_ngrams if embed is None else embed, name

    def announce(self, _: int) -> None:
        """Say nothing: it costs nothing."""

    def explain(self, evidence: Evidence) -> str:
        """Return the stretches nearest to what the firing ones have in common."""
        firing = [_stretch(e, place) for e in evidence.firing for place in e.firing[:2]]
        silent = [text for e in evidence.silent for text in _stretches(e)]
        if not firing:
            return ""
        vectors = self.embed(firing)
        common = vectors.mean(0)
        if silent:
            common = common - self.embed(silent).mean(0)
        others = vectors @ common - vectors.pow(2).sum(1) / len(vectors)
        nearest = others.argsort(descending=True, stable=True)[:N_QUOTED]
        return json.dumps([firing[i] for i in nearest.tolist()], ensure_ascii=False)

    def score(self, explanation: str, examples: Sequence[Example]) -> list[Confidence]:
        """Return cosines with the quoted stretches, or with the explanation's own words."""
        like = torch.nn.functional.normalize(self.embed(quoted(explanation)).mean(0), dim=0)
        texts = [
            [_stretch(e, place) for place in e.marked] if e.marked else _stretches(e)
            for e in examples
        ]
        cosines = self.embed([text for group in texts for text in group]) @ like
        parts = cosines.split([len(group) for group in texts])
        pairs = zip(parts, examples, strict=True)
        return [float(part.mean() if e.marked else part.max()) for part, e in pairs]


def similarity_judge(settings: EvalConfig) -> SimilarityJudge:
    """Return the judge whose embedder `eval.embedder` names.

    Errors: RuntimeError where the package of the sentence encoder is not installed.
    """
    if settings.embedder != "minilm":
        return SimilarityJudge()
    encode = sentence_encoder()
    return SimilarityJudge(lambda texts: encode(texts).cpu(), "similarity by minilm")


def quoted(explanation: str) -> list[str]:
    """Return the stretches that an explanation quotes; the explanation itself where it is none."""
    try:
        found = json.loads(explanation)
    except ValueError:
        return [explanation]
    is_list = isinstance(found, list) and all(isinstance(text, str) for text in found)
    return found if is_list and found else [explanation]


def hashed_ngrams(texts: Sequence[str]) -> Tensor:
    """Return unit vectors (n, WIDTH) of texts' words and pairs of words, hashed with signs.

    Source: Weinberger et al. 2009, "Feature hashing for large scale multitask learning".
    """
    rows, columns, signs = [], [], []
    for row, text in enumerate(texts):
        words = re.findall(r"\w+|[^\w\s]+", text.lower())
        for gram in (*words, *map(" ".join, pairwise(words))):
            code = zlib.crc32(gram.encode())
            rows.append(row)
            columns.append(code % WIDTH)
            signs.append(1.0 if code >> 31 else -1.0)
    vectors = torch.zeros(len(texts), WIDTH)
    places = torch.tensor([rows, columns], dtype=torch.int64).unbind(0)
    vectors.index_put_(places, torch.tensor(signs), accumulate=True)
    return torch.nn.functional.normalize(vectors, dim=1)


def _stretch(example: Example, place: int) -> str:
    return "".join(example.tokens[max(place - REACH, 0) : place + REACH + 1]).strip()


def _stretches(example: Example) -> list[str]:
    """Return stretches that cover the text; at least one."""
    places = range(0, len(example.tokens), STRIDE) or [0]
    return [_stretch(example, place) for place in places]
