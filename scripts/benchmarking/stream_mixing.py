"""How far batches of real documents are from independent draws, by the size of the buffer."""

from itertools import islice
from typing import Any

import torch

from benchmarking.stream_rates import Row, buffered
from sae.config import Config
from sae.stream.mixing import mixing
from sae.stream.opening import OpenedModel
from sae.stream.rows import Block

BATCHES = 40


class DocumentRows:
    """The kept tokens of a text without a model: rows that say nothing, with their documents."""

    names, widths, dtypes = ("tokens",), (1,), (torch.float32,)

    def __init__(self, opened: OpenedModel, cfg: Config):
        self.contexts, self.n = opened.contexts("train"), cfg.stream.sequences_per_forward

    @property
    def epoch(self) -> int:
        return self.contexts.epoch

    def next_block(self) -> Block:
        contexts = self.contexts.next_batch(self.n)
        documents = contexts.document_ids[contexts.is_kept]
        return Block((torch.zeros(len(documents), 1),), documents)


def mixed(opened: OpenedModel, cfg: Config, capacity: int, batch: int) -> Row:
    """Return how often rows of a batch share a document, over what draws from the buffer give."""
    stream: Any = DocumentRows(opened, cfg)
    source = buffered(stream, cfg, buffer_tokens=capacity)
    totals: dict[str, list[float]] = {}
    every = max(1, 2 * capacity // batch // BATCHES)  # over some refills
    for number in islice(range(10**9), every * BATCHES):
        source.next_batch(batch)
        if number % every == 0:
            for name, value in mixing(list(source.lanes.values())).items():
                totals.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in totals.items()}
    lane = source.lanes[0]
    ratio = means["pairs_over_buffer"]
    return {
        "name": f"mixing: a buffer of {capacity:,} tokens",
        "value": ratio,
        "unit": "× draws from the buffer",
        "goal": "≤ 1.2",
        "is_met": ratio <= 1.2,
        "note": f"{means['pairs_over_text']:.2f} × draws from all {lane.n_rows:,} tokens read so "
        f"far; {100 * means['same_document_pairs']:.3f}% of pairs share a document",
    }
