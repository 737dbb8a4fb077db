"""Targeted probe perturbation: ablating the right latent removes a concept, and only that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_worlds import ToyWorld, gaussian

from sae.coder.latents import Latents
from sae.evals import evaluate_on_world
from sae.evals.blocks import N_BLOCKS
from sae.evals.interface import EvalSetup
from sae.evals.nulls import RandomDirections, ShuffledCodes, TrueDictionary
from sae.evals.perturbation import N_ROWS, Perturbation
from sae.evals.targeted import Hits
from sae.evals.truth import Truth, TruthBatch

N = 8000


@pytest.fixture(scope="module")
def world() -> Any:
    return ToyWorld(d_in=32)


def metrics(coder: Any, world: Any) -> dict[str, Any]:
    found = evaluate_on_world(coder, world, N, names=["perturbation"], n_resamples=50)
    return dict(found.metrics)


def test_the_truth_is_above_its_nulls(world: Any) -> None:
    true = TrueDictionary(world, torch.arange(world.n_features))
    found = metrics(true, world)
    assert found["tpp_probe_accuracy"] > 0.9
    assert found["tpp_1"] > 0.25
    assert found["tpp_1/low"] <= found["tpp_1"] <= found["tpp_1/high"]
    assert found["tpp_difference"] > 0.25
    for name in ("tpp_random_direction", "tpp_random_latent"):
        assert abs(found[name]) < 0.05, name
    nulls = {
        "random": RandomDirections(world.bias, world.n_features, 4),
        "shuffled": ShuffledCodes(true, world.n_features),
    }
    for name, coder in nulls.items():
        assert metrics(coder, world)["tpp_1"] < 0.3 * found["tpp_1"], name


def test_a_decoder_with_permuted_rows_is_seen(world: Any) -> None:
    """Probing latents does not see it: the codes are right, what they write is not."""
    true = TrueDictionary(world, torch.arange(world.n_features))
    true.W_dec = true.W_dec.roll(5, 0)
    assert metrics(true, world)["tpp_1"] < 0.05


def test_a_concept_counts_in_the_resamples_that_hold_it() -> None:
    """Without the only document of concept 2, what is left is what concepts 0 and 1 give alone."""
    blocks, scores = torch.arange(60) % 6, gaussian(60, 3, seed=1)
    is_on = torch.stack([torch.arange(60) % 2 == 0, blocks < 3, blocks == 0], 1)
    changes = gaussian(180, 3, seed=2).reshape(3, 60, 3)
    weights = torch.zeros(2, N_BLOCKS, dtype=torch.float64)
    weights[0, :6], weights[1, 1:6] = 1, 1
    hits = Hits(scores, is_on, blocks)
    fewer = Hits(scores[:, :2], is_on[:, :2], blocks)
    whole, gap = hits.accuracy(weights), hits.gaps(weights, {"change": changes})["change"]
    assert bool(torch.isfinite(whole).all() & torch.isfinite(gap).all())
    expected = fewer.gaps(weights, {"change": changes[:2, :, :2]})["change"]
    assert whole[1] == pytest.approx(float(fewer.accuracy(weights)[1]))
    assert gap[1] == pytest.approx(float(expected[1]))
    assert gap[0] != pytest.approx(float(expected[0]))


def _batch(n: int) -> TruthBatch:
    codes = gaussian(n, 6, seed=3).clamp_min(0)
    x = codes @ gaussian(6, 8, seed=4)
    latents = Latents(codes, torch.arange(6).expand(n, 6).contiguous())
    rows = torch.arange(n)
    return TruthBatch(x, x, latents, torch.zeros_like(rows), rows, codes)


def _part(batch: TruthBatch, rows: slice) -> TruthBatch:
    latents = Latents(*(part[rows] for part in batch.latents))
    x, ids = batch.x[rows], batch.document_ids[rows]
    return TruthBatch(x, x, latents, batch.tokens[rows], ids, batch.codes[rows])


def test_parts_in_any_order_give_the_same() -> None:
    directions = gaussian(6, 8, seed=4)
    none = torch.zeros(0, 2, dtype=torch.int64)
    truth = Truth(directions, torch.zeros(8), directions, torch.arange(6), none)
    setup = EvalSetup(8, 6, 0, 50, truth)
    batch = _batch(600)
    whole, first, second = (Perturbation(setup) for _ in range(3))
    whole.update(batch)
    first.update(_part(batch, slice(400, 600)))
    second.update(_part(batch, slice(0, 400)))
    first.merge(second)
    assert first.compute() == whole.compute()
    assert first.seen.n_documents == 600


def test_rows_beyond_the_first_are_not_kept() -> None:
    none = torch.zeros(0, 2, dtype=torch.int64)
    directions = gaussian(6, 8, seed=4)
    truth = Truth(directions, torch.zeros(8), directions, torch.arange(6), none)
    kept = Perturbation(EvalSetup(8, 6, 0, 50, truth))
    batch = _batch(N_ROWS + 100)
    kept.update(batch)
    assert kept.seen.n_tokens == N_ROWS
