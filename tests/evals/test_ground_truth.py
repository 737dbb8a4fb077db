"""Ground truth: every number against a dense float64 reference, and what must not change it."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from typing import Any

import pytest
import torch
from eval_stand_ins import assert_same
from torch import Tensor
from toy_worlds import Linear, ToyWorld, gaussian, unit

from sae.coder.latents import Latents, from_dense
from sae.evals.cofiring import Cofiring
from sae.evals.families import Families
from sae.evals.ground_truth import LABELS, GroundTruth
from sae.evals.interface import EvalBatch, EvalSetup, Undefined
from sae.evals.matching import absolute_cosines, assigned
from sae.evals.reconstruction import Reconstruction
from sae.evals.truth import Truth, TruthBatch

M, N_FEATURES, D, N = 5, 7, 6, 400
NO_PAIRS = torch.zeros(0, 2, dtype=torch.int64)
PAIRS = torch.tensor([[0, 1], [0, 2], [3, 4]])


class Case:
    """A dictionary, a world and rows, all of one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.true = unit(gaussian(N_FEATURES, D, seed=seed))
        self.decoder = gaussian(M, D, seed=seed + 1)
        fires = gaussian(N, N_FEATURES, seed=seed + 2) > 0.5
        self.codes = torch.where(fires, 1 + gaussian(N, N_FEATURES, seed=seed + 3).abs(), 0.0)
        signed = gaussian(N, M, seed=seed + 4) + self.codes[:, :M] - 0.5
        self.z = torch.where(signed.abs() > 0.6, signed, 0.0)
        self.bias = gaussian(D, seed=seed + 5)
        self.x = self.codes @ self.true + self.bias
        self.x_hat = self.z @ self.decoder
        self.frequent = torch.tensor([4, 0, 2])

    def accumulator(self, pairs: Tensor = PAIRS) -> GroundTruth:
        truth = Truth(self.true, self.bias, self.decoder, self.frequent, pairs)
        return GroundTruth(EvalSetup(D, len(self.decoder), n_resamples=20, truth=truth))

    def batch(self, rows: slice | Tensor) -> TruthBatch:
        numbers = torch.arange(N)[rows]
        return TruthBatch(
            self.x[rows],
            self.x_hat[rows],
            from_dense(self.z[rows]),
            torch.zeros_like(numbers),
            numbers,
            self.codes[rows],
        )

    def computed(self, pairs: Tensor = PAIRS) -> dict[str, Any]:
        accumulator = self.accumulator(pairs)
        accumulator.update(self.batch(slice(None)))
        return accumulator.compute()


def best_assignment(scores: Tensor) -> float:
    """Try every one-to-one assignment of the rows, which are the fewer."""
    m, n = scores.shape
    every = itertools.permutations(range(n), m)
    return max(float(scores[range(m), columns].mean()) for columns in map(list, every))


def f1_of(fires: Tensor, is_true: Tensor) -> float:
    hits = int((fires & is_true).sum())
    return 2 * hits / max(int(fires.sum()) + int(is_true.sum()), 1)


@pytest.mark.parametrize("seed", [0, 10])
def test_directions_equal_their_definitions(seed: int):
    case = Case(seed)
    case.decoder[0] = -2 * case.decoder[1] if seed else case.decoder[0]
    found = case.computed()
    cosines = (unit(case.decoder).double() @ case.true.double().T).abs()
    assert found["mcc"] == pytest.approx(best_assignment(cosines), rel=1e-6)
    assert found["mmcs_latents"] == pytest.approx(float(cosines.amax(1).mean()), rel=1e-6)
    assert found["mmcs_features"] == pytest.approx(float(cosines.amax(0).mean()), rel=1e-6)
    assert found["uniqueness"] == len(set(cosines.argmax(1).tolist())) / M
    assert (found["uniqueness"] < 1) == (seed > 0)


def test_detection_equals_a_loop_over_latents():
    case = Case()
    found = case.computed()
    cosines = (unit(case.decoder).double() @ case.true.double().T).abs()
    scores = []
    for k in range(M):
        fires, is_true = case.z[:, k] != 0, case.codes[:, int(cosines[k].argmax())] > 0
        hits = float((fires & is_true).sum())
        scores.append(
            (hits / float(fires.sum()), hits / float(is_true.sum()), f1_of(fires, is_true))
        )
    precision, recall, f1 = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()
    assert found["precision"] == pytest.approx(precision)
    assert found["recall"] == pytest.approx(recall)
    assert found["f1"] == pytest.approx(f1)


def test_f1_act_chooses_on_even_rows_and_scores_on_odd_ones():
    case = Case()
    z, y = case.z != 0, case.codes > 0
    scores = []
    for k in range(M):
        chosen = max(range(N_FEATURES), key=lambda j: f1_of(z[::2, k], y[::2, j]))
        scores.append(f1_of(z[1::2, k], y[1::2, chosen]))
    assert case.computed()["f1_act"] == pytest.approx(sum(scores) / M)


def test_code_mcc_equals_all_assignments_of_numpy_correlations():
    case = Case()
    joint = torch.corrcoef(torch.cat([case.z, case.codes], 1).double().T)[:M, M:].abs()
    assert case.computed()["code_mcc"] == pytest.approx(best_assignment(joint), rel=1e-9)


def test_magnitude_r2_is_over_rows_in_which_both_fire():
    case = Case()
    nearest = (unit(case.decoder) @ case.true.T).abs().argmax(1)
    expected = []
    for k in range(M):
        z, a = case.z[:, k].double(), case.codes[:, nearest[k]].double()
        both = (z != 0) & (a > 0)
        expected.append(float(torch.corrcoef(torch.stack([z[both], a[both]]))[0, 1] ** 2))
    assert case.computed()["magnitude_r2"] == pytest.approx(sum(expected) / M, rel=1e-6)


def test_the_oracle_is_the_named_features_with_their_codes():
    case = Case()
    found = case.computed()
    x = case.x.double()
    squares = (x - x.mean(0)).pow(2).sum()
    kept = case.codes[:, case.frequent] @ case.true[case.frequent] + case.bias
    oracle = 1 - (x - kept.double()).pow(2).sum() / squares
    own = 1 - (x - case.x_hat.double()).pow(2).sum() / squares
    assert found["ev_oracle"] == pytest.approx(float(oracle), rel=1e-6)
    assert found["ev_minus_oracle"] == pytest.approx(float(own - oracle), rel=1e-6)
    assert found["ev_minus_oracle/low"] < found["ev_minus_oracle"] < found["ev_minus_oracle/high"]
    assert found["true_l0"] == pytest.approx(float((case.codes > 0).sum() / N))


@pytest.mark.parametrize("size", [1, 7, 64, 399])
def test_batches_and_merging_change_nothing(size: int):
    case = Case()
    left, right = case.accumulator(), case.accumulator()
    for i, start in enumerate(range(0, N, size)):
        (left, right)[i % 2].update(case.batch(slice(start, start + size)))
    right.merge(left)
    assert_same(right.compute(), case.computed(), rel=1e-9)
    whole = case.accumulator()
    whole.update(case.batch(torch.arange(N - 1, -1, -1)))
    for name, values in whole.arrays().items():
        assert torch.allclose(values, right.arrays()[name]), name


def test_order_and_signs_of_latents_and_scale_of_rows_change_nothing():
    case, moved = Case(), Case()
    order = torch.tensor([3, 1, 4, 0, 2])
    factor = torch.tensor([1.0, -1.0, 2.0, -0.5, 1.0])
    moved.decoder, moved.z = (case.decoder / factor[:, None])[order], (case.z * factor)[:, order]
    assert_same(moved.computed(), case.computed(), rel=1e-6)


def test_a_dead_latent_counts_against_the_mean_over_all():
    case = Case()
    case.z[:, 0] = 0
    found = case.computed()
    assert found["f1_of_alive"] == pytest.approx(found["f1"] * M / (M - 1))
    case.z[:] = 0
    found = case.computed()
    assert found["f1"] == found["precision"] == found["code_mcc"] == 0
    assert isinstance(found["f1_of_alive"], Undefined)
    assert isinstance(found["magnitude_r2"], Undefined)


def test_recovered_counts_matched_pairs_above_the_cosine():
    true = torch.eye(3)
    angles = torch.tensor([0.0, 0.5, 0.8])  # cosines 1, 0.878 and 0.697
    decoder = true * angles.cos()[:, None] + true.roll(1, 0) * angles.sin()[:, None]
    pairs = assigned(absolute_cosines(decoder, true))
    assert sorted((pairs >= 0.8).tolist()) == [False, True, True]
    case = Case()
    case.decoder = torch.cat([case.true[:3], case.true[4:5] * 0, case.true[4:5]])
    found = case.computed()
    assert found["recovered_0.9"] == 0.8
    assert found["recovered_0.8"] >= 0.8


def test_a_row_of_nan_free_zeros_matches_nothing():
    assert absolute_cosines(torch.zeros(2, 4), gaussian(3, 4, seed=0)).eq(0).all()


def test_unused_slots_and_large_codes_count_once():
    """A slot of value 0 may name any latent; pairs are taken in many pieces."""
    values, indices = torch.tensor([[2.0, 0.0]] * 4), torch.tensor([[1, 0]] * 4)
    true = Latents(torch.tensor([[3.0, 0.0]] * 4), torch.tensor([[2, 1]] * 4))
    counts = Cofiring(2, 3)
    counts.update(Latents(values, indices), true, torch.tensor([0, 1, 0, 0]))
    assert counts.both.sum() == 4
    assert counts.both[:, 1, 2].tolist() == [3, 1]
    assert counts.latent.tolist() == [[0, 3], [0, 1]]
    assert counts.product[1, 2] == 24


def test_parents_are_looked_for_with_and_without_their_children():
    """Feature 0 is the parent of 1 and 2; its latent is silent where 1 fires, fires with 2."""
    true = torch.tensor([[1, 0, 0]] * 40 + [[1, 1, 0]] * 10 + [[1, 0, 1]] * 20, dtype=torch.bool)
    fires = torch.stack([true[:, 0] & ~true[:, 1], true[:, 2]], 1)
    counts = Families(torch.tensor([[0, 1], [0, 2]]), torch.tensor([0, 1, 1]))
    counts.update(fires, true)
    assert counts.compute() == {
        "parent_recall_child_on": 0.5,
        "parent_recall_child_off": 1.0,
        "pairs_detected": 1.0,
    }


def test_recall_beside_children_is_over_parents_that_are_found():
    """Parents 0 and 2, children 1 and 3; the latent of 2 fires nowhere but beside its child."""
    true = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]] * 20, dtype=torch.bool)
    fires = torch.stack([~true[:, 1], true[:, 3]], 1)
    counts = Families(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 0, 1, 1]))
    counts.update(fires, true)
    assert counts.compute() == {
        "parent_recall_child_on": 0.0,
        "parent_recall_child_off": 0.5,
        "pairs_detected": 0.5,
    }


def test_parents_that_are_not_found_cannot_be_absorbed():
    true = torch.tensor([[1, 0], [1, 1]] * 20, dtype=torch.bool)
    counts = Families(torch.tensor([[0, 1]]), torch.tensor([0, 0]))
    counts.update(torch.zeros(40, 1, dtype=torch.bool), true)
    found = counts.compute()
    assert found["pairs_detected"] == 0
    assert "without its children" in found["parent_recall_child_on"].reason
    without = Case().computed(pairs=NO_PAIRS)
    assert isinstance(without["parent_recall_child_off"], Undefined)


def test_every_metric_has_a_label_and_nothing_answers_without_rows():
    case = Case()
    assert {name for name in case.computed() if "/" not in name} == set(LABELS)
    assert isinstance(case.accumulator().compute()["f1"], Undefined)
    with pytest.raises(ValueError, match="evaluate_on_world"):
        GroundTruth(EvalSetup(D, M))


def test_tenths_go_from_the_most_frequent_features_down():
    case = Case()
    accumulator = case.accumulator()
    accumulator.update(case.batch(slice(None)))
    arrays = accumulator.arrays()
    rates = (case.codes > 0).double().mean(0).sort(descending=True).values
    assert torch.allclose(arrays["tenths_firing_rate"], rates)
    order = (case.codes > 0).double().mean(0).argsort(descending=True, stable=True)
    cosines = absolute_cosines(case.decoder, case.true)
    assert torch.allclose(arrays["tenths_nearest_cosine"], cosines.amax(0)[order])
    is_nearest = torch.zeros(N_FEATURES).scatter(0, cosines.argmax(1), 1.0)
    assert ((arrays["tenths_f1"] > 0).double() == is_nearest[order].double()).all()


@pytest.mark.sae_lens
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae-lens not installed")
def test_the_benchmarks_own_package_gives_the_same_numbers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens.synthetic import evals as theirs  # pyright: ignore[reportMissingImports]
    world = ToyWorld()
    sample = world.sample(N, torch.Generator().manual_seed(0))
    rows = torch.cat(
        [world.directions[:9] + 0.2 * gaussian(9, 16, seed=3), gaussian(5, 16, seed=4)]
    )
    z = Linear(world, rows, rows).encode(sample.x)
    truth = Truth(world.directions, world.bias, rows, torch.arange(3), NO_PAIRS)
    ours = GroundTruth(EvalSetup(16, len(rows), n_resamples=2, truth=truth))
    numbers = torch.arange(N)
    ours.update(TruthBatch(sample.x, sample.x, from_dense(z), numbers, numbers, sample.codes))
    found = ours.compute()
    expected = theirs.compute_classification_metrics(z, sample.codes, rows, world.directions)
    assert found["mcc"] == pytest.approx(
        theirs.mean_correlation_coefficient(rows, world.directions), rel=1e-6
    )
    assert found["uniqueness"] == theirs.feature_uniqueness(rows, world.directions)
    assert found["f1"] == pytest.approx(expected.f1_score, rel=1e-6)
    assert found["precision"] == pytest.approx(expected.precision, rel=1e-6)
    assert found["recall"] == pytest.approx(expected.recall, rel=1e-6)


@pytest.mark.sae_lens
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae-lens not installed")
@pytest.mark.parametrize("size", [N, 700])
def test_explained_variance_is_that_of_sae_lens(size: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens.evals import (  # pyright: ignore[reportMissingImports]
            ExplainedVarianceCalculator,
        )
    x = 1 + gaussian(N, 8, seed=0)
    x_hat = x + 0.4 * gaussian(N, 8, seed=1)
    theirs, ours = ExplainedVarianceCalculator(), Reconstruction(EvalSetup(8, 8, n_resamples=2))
    for rows in torch.arange(N).split(size):
        theirs.add_batch(x_hat[rows], x[rows])
        code = from_dense(x_hat[rows])
        ours.update(EvalBatch(x[rows], x_hat[rows], code, rows, rows))
    assert ours.compute()["explained_variance"] == pytest.approx(theirs.compute(), abs=1e-6)
