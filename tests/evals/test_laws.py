"""Laws that every eval of the registry obeys, whatever it measures; new rows too."""

from __future__ import annotations

import math

import pytest
import torch
from eval_stand_ins import assert_same, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_worlds import Linear, ToyWorld, gaussian, unit

from sae.coder.coder import SparseCoder
from sae.coder.latents import Latents
from sae.config import CoderConfig, EvalConfig
from sae.evals import EVALS, evaluate
from sae.evals.evaluable import Evaluable
from sae.evals.interface import EvalSetup
from sae.evals.on_world import evaluate_on_world, truth_of
from sae.evals.reconstruction import Reconstruction
from sae.evals.truth import TruthBatch
from sae.stream.contexts import Contexts

N = 200
PAIRS = torch.tensor([[0, 2], [0, 3], [1, 4], [1, 5]])
ON_ROWS = [name for name, row in EVALS.items() if row.reads in ("activations", "world", "weights")]
ON_TEXT = [name for name, row in EVALS.items() if row.reads not in ("world", "labelled")]
SMALL = EvalConfig(probe_examples=32, probe_features=2, intervention_latents=4)


def turned(world: ToyWorld, q: torch.Tensor) -> ToyWorld:
    other = ToyWorld(is_tree=world.is_tree)
    other.directions, other.bias = world.directions @ q, world.bias @ q
    return other


def dictionary(world: ToyWorld, q: torch.Tensor | None = None) -> Linear:
    """Noisy true directions, the last of which never fires; rotated by q."""
    rows = unit(world.directions[:12] + 0.1 * gaussian(12, 16, seed=5))
    encoder = rows.clone()
    encoder[-1] = 0
    if q is None:
        return Linear(world, encoder, rows, k=8)
    return Linear(turned(world, q), encoder @ q, rows @ q, k=8)


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld(is_tree=True)


@pytest.fixture(scope="module")
def whole(world: ToyWorld) -> TruthBatch:
    sample = world.sample(N, torch.Generator().manual_seed(0))
    latents, x_hat = Evaluable(dictionary(world), 16).encode_decode(sample.x)
    numbers = torch.arange(N)
    return TruthBatch(sample.x, x_hat, latents, numbers % 7, numbers, sample.codes)


def part(batch: TruthBatch, index: torch.Tensor) -> TruthBatch:
    latents = Latents(*(values[index] for values in batch.latents))
    x, x_hat, codes = (values[index] for values in (batch.x, batch.x_hat, batch.codes))
    return TruthBatch(x, x_hat, latents, batch.tokens[index], batch.document_ids[index], codes)


@pytest.mark.parametrize("name", ON_ROWS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_split_order_and_ranks_change_nothing(name, world, whole, data):
    coder = Evaluable(dictionary(world), 16)
    setup = EvalSetup(16, 12, 0, 20, truth_of(coder, world, PAIRS), coder, SMALL)
    once = EVALS[name].make(setup)
    is_fed = EVALS[name].reads != "weights"
    if is_fed:
        once.update(whole)
    order = torch.tensor(data.draw(st.permutations(range(N))))
    cuts = sorted(data.draw(st.lists(st.integers(0, N), max_size=5)))
    n_ranks = data.draw(st.integers(1, 3))
    ranks = [EVALS[name].make(setup) for _ in range(n_ranks)]
    for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, N], strict=True)):
        if is_fed:
            ranks[i % n_ranks].update(part(whole, order[start:end]))
    for rank in ranks[1:]:
        ranks[0].merge(rank)
    assert ranks[0].seen.n_tokens == once.seen.n_tokens
    assert_same(ranks[0].compute(), once.compute(), rel=1e-9)
    for key, values in once.arrays().items():
        found = ranks[0].arrays()[key]
        assert torch.allclose(found.double(), values.double(), 1e-9, 1e-11, equal_nan=True), key


def test_a_rotation_of_the_data_changes_nothing_but_the_alignment_with_the_axes(world):
    q = torch.linalg.qr(gaussian(16, 16, seed=8)).Q
    before = evaluate_on_world(dictionary(world), world, 2000, pairs=PAIRS, n_resamples=20)
    after = evaluate_on_world(
        dictionary(world, q), turned(world, q), 2000, pairs=PAIRS, n_resamples=20
    )
    metrics = [dict(results.metrics) for results in (before, after)]
    alignment = [found.pop("basis_alignment") for found in metrics]
    assert alignment[0] != pytest.approx(alignment[1], rel=1e-2)
    # A baseline drawn at random in coordinates is another draw of the rotated data.
    drawn = [name for name in metrics[0] if "random_direction" in name]
    for name, value in metrics[0].items():
        if name in drawn:
            continue
        expected = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)
        assert metrics[1][name] == expected, name


def test_a_latent_that_never_fires_is_dead_and_nothing_is_nan(world):
    found = evaluate_on_world(dictionary(world), world, 2000, pairs=PAIRS, n_resamples=20)
    assert found.metrics["dead"] == pytest.approx(1 / 12)
    assert found.arrays["sparsity/firing_counts"][-1] == 0
    for name, value in found.metrics.items():
        assert value is None or math.isfinite(value), name


def test_batches_of_text_and_their_order_change_nothing(lm, hookpoint, contexts):
    coder = SparseCoder.create(32, CoderConfig(d_sae=64, k=8))
    halves = [
        Contexts(contexts.tokens[rows], contexts.document_ids[rows], contexts.is_kept[rows])
        for rows in (slice(5, None), slice(0, 5))
    ]
    found = [
        evaluate(
            coder,
            given,
            lm=lm,
            hookpoint=hookpoint,
            names=ON_TEXT,
            n_resamples=20,
            settings=SMALL,
        )
        for given in ([contexts], halves)
    ]
    for name in ON_TEXT:
        keys = found[0].evals[name].metrics
        assert found[1].evals[name].metrics == keys
        for key in keys:
            one, other = found[0].metrics[key], found[1].metrics[key]
            if isinstance(one, float):
                # The model's own float32 sums depend on the batch's shape.
                assert other == pytest.approx(one, rel=1e-4, abs=1e-4), key
            else:
                assert other == one, key


def traps() -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """x, x_hat and the explained variance that they have, for rows that mislead other formulas."""
    x = gaussian(3000, 8, seed=0).double() * torch.linspace(0.2, 3, 8)
    x -= x.mean(0)
    variance = x.pow(2).sum()
    offset = torch.full((8,), 2.0, dtype=torch.float64)
    bos = x.clone()
    bos[::30] = 200 * x.norm(dim=1).mean() * torch.eye(8, dtype=torch.float64)[0]
    kept = torch.arange(3000) % 30 != 0
    masked = bos[kept]
    spread = (masked - masked.mean(0)).pow(2).sum()
    return {
        "the mean": (x + 50, (x + 50).mean(0).expand_as(x), 0.0),
        "x itself": (x, x, 1.0),
        "offset": (x, x + offset, float(1 - 3000 * offset.pow(2).sum() / variance)),
        "x far from 0": (x + 1e4, 0.7 * x + 1e4, 1 - 0.09),
        "twice x": (x, 2 * x, 0.0),
        "only BOS given back": (
            masked,
            torch.zeros_like(masked),
            float(1 - masked.pow(2).sum() / spread),
        ),
    }


@pytest.mark.parametrize("name", traps())
@pytest.mark.parametrize("size", [3000, 700, 7])
def test_rows_that_mislead_other_explained_variances(name, size):
    x, x_hat, expected = traps()[name]
    accumulator = Reconstruction(EvalSetup(8, 8, n_resamples=2))
    whole = make_batch(x, x_hat)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        accumulator.update(make_batch(whole.x[rows], whole.x_hat[rows], whole.document_ids[rows]))
    assert accumulator.compute()["explained_variance"] == pytest.approx(expected, abs=1e-6)
