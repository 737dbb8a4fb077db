"""What the evals' tests share: a stand-in coder, and batches made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sae.coder.latents import Latents, from_dense
from sae.evals.interface import EvalBatch, Undefined, Value


@dataclass
class FunctionCoder:
    """Reconstructs by a function of x; its code is x itself."""

    reconstruct: Callable[[Tensor], Tensor]

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, dense: Tensor) -> Tensor:
        return self.reconstruct(dense)


def make_batch(
    x: Tensor, x_hat: Tensor, document_ids: Tensor | None = None, codes: Tensor | None = None
) -> EvalBatch:
    """An EvalBatch in which every token is a document of its own, unless told otherwise."""
    ids = torch.arange(len(x)) if document_ids is None else document_ids
    latents = Latents(x[:, :1], torch.zeros(len(x), 1, dtype=torch.long))
    latents = latents if codes is None else from_dense(codes)
    return EvalBatch(x, x_hat, latents, torch.zeros(len(x), dtype=torch.long), ids)


def rows(batch: EvalBatch, index: Tensor) -> EvalBatch:
    """Some tokens of a batch."""
    return EvalBatch(
        batch.x[index],
        batch.x_hat[index],
        Latents(*(part[index] for part in batch.latents)),
        batch.tokens[index],
        batch.document_ids[index],
    )


def assert_same(found: Mapping[str, Value], expected: Mapping[str, Value], rel: float) -> None:
    """Two results are equal but for rounding; undefined values have the same reason."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Undefined):
            assert found[name] == value, name
        else:
            assert found[name] == pytest.approx(value, rel=rel, abs=1e-11), name
