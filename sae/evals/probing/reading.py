"""Labelled texts as a coder sees them: the activation and the code of each text's last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.evaluable import Evaluable
from sae.evals.probing.labelled import LabelledText, LabelledTexts
from sae.stream.reader import Reader

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class LabelledBatch:
    """Texts of one task with what the coder makes of their last token.

    Attributes:
        task: number of the data set. x: (n, Σ widths) activations. latents: (n, k) each.
        is_on: (n) bool. numbers, halves: (n) int64, of `LabelledText`.
        n_tokens: tokens that the model read.
    """

    task: int
    x: Tensor
    latents: Latents
    is_on: Tensor
    numbers: Tensor
    halves: Tensor
    n_tokens: int


@torch.no_grad()
def labelled_batches(
    texts: LabelledTexts, reader: Reader, coder: Evaluable, context_tokens: int
) -> Iterator[LabelledBatch]:
    """Yield all texts, data set by data set, texts of like length together.

    Tokens are what the model's own tokenizer gives, its special tokens too; of a long text the last
    `context_tokens`, behind its first token where that is special. Padding stands behind the text,
    where a causal model does not see it.
    """
    lm, _ = reader.sites[0]
    for task, name in enumerate(texts.names):
        drawn = list(texts.texts(name))
        ids = [_last(lm.tokenizer, text.text, context_tokens) for text in drawn]
        for rows in _groups([len(one) for one in ids]):
            x = _last_activations(reader, [ids[row] for row in rows])
            latents, _ = coder.encode_decode(x)
            n_tokens = sum(len(ids[row]) for row in rows)
            yield _batch(task, x, latents, [drawn[row] for row in rows], n_tokens)


def _batch(
    task: int, x: Tensor, latents: Latents, texts: Sequence[LabelledText], n_tokens: int
) -> LabelledBatch:
    return LabelledBatch(
        task,
        x,
        latents,
        torch.tensor([text.is_on for text in texts]),
        torch.tensor([text.number for text in texts]),
        torch.tensor([text.half for text in texts]),
        n_tokens,
    )


def _last(tokenizer: Any, text: str, n: int) -> list[int]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= n:
        return ids or [tokenizer.eos_token_id or 0]
    begins = ids[:1] if ids[0] in tokenizer.all_special_ids else []
    return begins + ids[len(ids) - n + len(begins) :]


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield rows of like length, at most BATCH_TOKENS tokens with their padding."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[row] > BATCH_TOKENS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _last_activations(reader: Reader, ids: Sequence[list[int]]) -> Tensor:
    """Return the activations at each text's last token, (n, Σ widths) float32."""
    ends = torch.tensor([len(one) - 1 for one in ids])
    tokens = torch.zeros(len(ids), int(ends.max()) + 1, dtype=torch.int64)
    for row, one in enumerate(ids):
        tokens[row, : len(one)] = torch.tensor(one)
    rows = torch.arange(len(ids))
    parts = reader.read(tokens)
    return torch.cat(
        [part[rows.to(part.device), ends.to(part.device)].float() for part in parts], 1
    )
