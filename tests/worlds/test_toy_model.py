"""Toy models of superposition keep the features that the paper's do."""

from __future__ import annotations

import pytest
import torch
from world_cases import codes_of

from sae.config import WorldConfig
from sae.worlds import evaluation_generator, feature_dimensionality, make_world, train_toy_model


def test_dimensionality_of_known_arrangements():
    pairs = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    assert feature_dimensionality(pairs).tolist() == pytest.approx([0.5, 0.5, 1.0, 0.0])
    angles = 2 * torch.pi * torch.arange(5) / 5
    pentagon = torch.stack([angles.cos(), angles.sin()])
    assert feature_dimensionality(pentagon).tolist() == pytest.approx([0.4] * 5)


@pytest.mark.parametrize(
    ("sparsity", "n_kept", "share"), [(0.0, 2, 1.0), (0.8, 4, 0.5), (0.9, 5, 0.4)]
)
def test_five_features_in_two_dimensions(sparsity: float, n_kept: int, share: float):
    toy = train_toy_model(5, 2, sparsity=sparsity, importance=0.9, steps=400)
    norms = toy.weight.norm(dim=0)
    is_kept = norms > 0.5
    assert int(is_kept.sum()) == n_kept
    assert is_kept[:n_kept].all()  # the most important ones
    assert (feature_dimensionality(toy.weight)[is_kept] - share).abs().max() < 0.08
    unit = toy.weight[:, is_kept] / norms[is_kept]
    cosines = unit.T @ unit
    if n_kept == 4:
        assert (cosines.sort(1).values[:, 0] < -0.98).all()  # each has its antipode
    if n_kept == 5:
        angles = torch.atan2(unit[1], unit[0]).sort().values.diff()
        assert (angles - 2 * torch.pi / 5).abs().max() < 0.08


def test_a_hundred_features_in_ten_dimensions_lie_in_antipodal_pairs():
    """At 1 / (1 − sparsity) = 3 every feature that is kept has half a dimension."""
    toy = train_toy_model(100, 10, sparsity=2 / 3, importance=1.0, steps=300)
    is_kept = toy.weight.norm(dim=0) > 0.5
    assert 18 <= int(is_kept.sum()) <= 20
    assert (feature_dimensionality(toy.weight)[is_kept] - 0.5).abs().max() < 0.01


def test_a_toy_world_is_the_hidden_layer_over_the_features_that_were_kept():
    cfg = WorldConfig(name="toy_model", sparsity=0.8, toy_steps=120)
    world = make_world(cfg)
    toy = train_toy_model(5, 2, sparsity=0.8, importance=0.9, steps=120, seed=42)
    norms = toy.weight.norm(dim=0)
    kept = toy.weight[:, norms > 0.5 * norms.max()]
    assert world.n_features == kept.shape[1] < 5
    assert torch.allclose(world.directions * kept.norm(dim=0)[:, None], kept.T, atol=1e-6)
    codes = codes_of(world)
    sizes = codes / kept.norm(dim=0)
    assert sizes.max() <= 1
    assert torch.allclose((codes > 0).float().mean(0), torch.tensor(0.2), atol=0.01)
    assert sizes[sizes > 0].mean() == pytest.approx(0.5, abs=0.01)
    sample = world.sample(50, evaluation_generator(1))
    assert torch.allclose(sample.x, sample.codes @ world.directions, atol=1e-6)


def test_the_same_seed_gives_the_same_model():
    one, other, third = (
        train_toy_model(4, 2, sparsity=0.5, importance=0.9, steps=5, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.weight, other.weight)
    assert not torch.equal(one.weight, third.weight)
