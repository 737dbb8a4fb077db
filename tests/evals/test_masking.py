"""Masked tokens counted and left out: both numbers, and how far they are apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from eval_stand_ins import FunctionCoder

from sae.coder.latents import Latents
from sae.evals import evaluate
from sae.evals.evaluable import Evaluable
from sae.evals.interface import ContextBatch, EvalSetup, Undefined
from sae.evals.masking import Masking
from sae.stream.contexts import CapturedContexts
from sae.stream.masks import PADDING_DOCUMENT

D, B, T = 6, 20, 10


@pytest.fixture
def contexts() -> CapturedContexts:
    """20 contexts of a document each; their first token is masked and 200 times as long, their
    last one is padding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=generator)
    x[:, 0] = 200 * D**0.5 * torch.eye(D)[0]
    ids = torch.arange(B)[:, None].repeat(1, T)
    ids[:, -1] = PADDING_DOCUMENT
    is_kept = torch.ones(B, T, dtype=torch.bool)
    is_kept[:, [0, -1]] = False
    return CapturedContexts(torch.zeros(B, T, dtype=torch.int64), ids, is_kept, x)


def found(contexts: CapturedContexts, reconstruct) -> dict:
    names = ["masking", "reconstruction", "sparsity"]
    coder = FunctionCoder(reconstruct)
    return evaluate(coder, [contexts], names=names, n_resamples=20).metrics


def test_a_bos_given_back_alone_is_praised_only_where_it_counts(contexts):
    """The trap: everything but BOS is zeroed."""
    metrics = found(contexts, lambda x: torch.where(x.norm(dim=1, keepdim=True) > 100, x, 0.0))
    assert metrics["unmasked_fvu"] < 0.01
    assert metrics["fvu"] > 0.95
    assert metrics["mask_matters"] > 0.9
    assert metrics["masked"] == pytest.approx(1 / (T - 1))
    assert metrics["masked_norm"] > 100


def test_the_numbers_are_those_of_all_tokens_but_padding(contexts):
    metrics = found(contexts, lambda x: 0.5 * x + 0.1)
    x = contexts.activations[:, :-1].flatten(0, 1).double()
    fvu = (0.5 * x - 0.1).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    cosine = torch.cosine_similarity(x, 0.5 * x + 0.1).mean()
    assert metrics["unmasked_fvu"] == pytest.approx(float(fvu), rel=1e-5)
    assert metrics["unmasked_cosine"] == pytest.approx(float(cosine), rel=1e-5)
    assert metrics["unmasked_l0"] == pytest.approx(float((x != 0).sum() / len(x)))
    assert metrics["unmasked_fvu/low"] <= metrics["unmasked_fvu"] <= metrics["unmasked_fvu/high"]


def test_without_masked_tokens_both_are_the_same(contexts):
    kept = replace(
        contexts,
        **{
            name: getattr(contexts, name)[:, 1:-1]
            for name in ("tokens", "document_ids", "is_kept", "activations")
        },
    )
    metrics = found(kept, lambda x: 0.5 * x)
    assert metrics["unmasked_fvu"] == metrics["fvu"]
    assert metrics["masked"] == metrics["mask_matters"] == 0
    assert metrics["masked_norm"] is None


def test_any_batches_and_ranks_give_the_same(contexts):
    coder = Evaluable(FunctionCoder(lambda x: 0.7 * x), D)
    setup = EvalSetup(D, D, n_resamples=5, coder=coder)

    def batch(rows: slice) -> ContextBatch:
        fields = ("tokens", "document_ids", "is_kept", "activations")
        part = CapturedContexts(*(getattr(contexts, name)[rows] for name in fields))
        kept = part.is_kept.flatten().nonzero()[:, 0]
        none = Latents(torch.zeros(len(kept), 1), torch.zeros(len(kept), 1, dtype=torch.int64))
        return ContextBatch(part, none, kept)

    once, one, other = (Masking(setup) for _ in range(3))
    once.update(batch(slice(None)))
    one.update(batch(slice(7, None)))
    other.update(batch(slice(0, 7)))
    one.merge(other)
    assert one.compute() == pytest.approx(once.compute(), rel=1e-9)
    assert isinstance(Masking(setup).compute()["masked"], Undefined)
