"""What a world draws has the law that its settings say."""

from __future__ import annotations

import pytest
import torch
from dense_law import dense_codes
from world_cases import codes_of, deviations, firing_correlation, rates, small

from sae.config import WorldConfig
from sae.worlds import evaluation_generator, make_world
from sae.worlds.firing import Fired, merged
from sae.worlds.forest import compensated, grow_forest
from sae.worlds.geometry import draw_directions, mean_max_cosine

N = 20_000


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"correlation_scale": 0.4, "correlation_rank": 5},
        {"correlation_scale": 0.3, "correlation_rank": 3, "trees": 0},
        {"correlation_rank": 0, "exclusive_share": 0.0},
        {"exclusive_share": 0.5, "scaled_by_parent": False, "compensated": False},
        {"first_magnitude": 0.5, "last_magnitude": 0.2, "trees": 2},
        {"trees": 0, "rarest": 0.001, "commonest": 0.03},
    ],
    ids=lambda settings: " ".join(settings) or "as given",
)
def test_draws_have_the_law_written_densely(settings: dict):
    world = small(**settings)
    ours, dense = codes_of(world, N), dense_codes(world, N, 1)
    apart = deviations(rates(ours), rates(dense), N) / 2**0.5
    assert apart.abs().max() < 4.5
    assert apart.square().mean() < 2
    a, b = firing_correlation(ours), firing_correlation(dense)
    assert (a - b).square().mean().sqrt() < 1.3 * (2 / N) ** 0.5
    for power in (1, 2):
        one, other = ours.double() ** power, dense**power
        error = ((one.var(0) + other.var(0)) / N).sqrt().clamp(min=1e-9)
        assert ((one.mean(0) - other.mean(0)) / error).square().mean() < 2


def test_x_is_codes_times_directions_plus_bias():
    world = small()
    sample = world.sample(500, evaluation_generator(0))
    expected = sample.codes.double() @ world.directions.double() + world.bias.double()
    assert sample.x.dtype == sample.codes.dtype == torch.float32
    assert torch.allclose(sample.x.double(), expected, atol=1e-5)
    assert torch.equal(world.activations(500, evaluation_generator(0)), sample.x)
    assert world.directions.norm(dim=1).sub(1).abs().max() < 1e-6
    assert float(world.bias.norm()) == pytest.approx(0.5)
    assert float(small(bias_norm=2.0).bias.norm()) == pytest.approx(2.0)


def test_rows_where_nothing_fires_are_the_bias():
    world = small(probabilities=(0.003,), trees=0)
    sample = world.sample(400, evaluation_generator(0))
    is_empty = (sample.codes == 0).all(1)
    assert is_empty[-1] or is_empty[0] or is_empty.sum() > 100
    assert is_empty.sum() > 100
    assert torch.equal(sample.x[is_empty], world.bias.expand(int(is_empty.sum()), -1))


def test_children_fire_only_with_their_parents_and_siblings_exclude_each_other():
    world = small()
    codes, forest = codes_of(world, 20_000), world.firing.forest
    child = (forest.parent >= 0).nonzero()[:, 0]
    assert len(child) == 4 * 12
    is_on = codes > 0
    assert not (is_on[:, child] & ~is_on[:, forest.parent[child]]).any()
    for parent in forest.is_exclusive.nonzero()[:, 0]:
        siblings = forest.children[parent]
        siblings = siblings[siblings >= 0]
        assert is_on[:, siblings].sum(1).max() == 1
    free = codes_of(small(exclusive_share=0.0), 20_000) > 0
    assert free[:, forest.children[0]].sum(1).max() == 3


def test_compensation_gives_features_about_the_probabilities_that_were_asked_for():
    asked = torch.linspace(0.3, 0.02, 64)
    settings = {"probabilities": tuple(asked.tolist()), "correlation_rank": 0, "trees": 2}
    with_it = rates(codes_of(small(**settings, exclusive_share=0.0)))
    assert deviations(with_it, asked.double(), N).abs().max() < 4.5
    without = rates(codes_of(small(**settings, exclusive_share=0.0, compensated=False)))
    forest = small(**settings).firing.forest
    level_1 = forest.children[0]
    assert torch.allclose(without[level_1], asked[level_1].double() * asked[0], atol=0.006)


def test_compensated_probabilities_by_hand():
    """A root with 0.4 and exclusive children with 0.1 and 0.2: 0.1/0.4 · (1 + 0.2/0.4)."""
    generator = torch.Generator().manual_seed(0)
    asked = torch.tensor([0.4, 0.1, 0.2, 0.05])
    shape = {"trees": 1, "branching": 2, "depth": 1, "generator": generator}
    forest = grow_forest(4, **shape, exclusive_share=1.0)
    expected = torch.tensor([0.4, 0.375, 0.625, 0.05])
    assert torch.allclose(compensated(asked, forest).float(), expected)
    forest = grow_forest(4, **shape, exclusive_share=0.0)
    expected = torch.tensor([0.4, 0.25, 0.5, 0.05])
    assert torch.allclose(compensated(asked, forest).float(), expected)
    crowded = torch.tensor([0.1, 0.1, 0.2, 0.05])
    assert compensated(crowded, forest).max() == 1


def test_trees_are_numbered_breadth_first_over_all_of_them():
    generator = torch.Generator().manual_seed(0)
    forest = grow_forest(
        12, trees=2, branching=2, depth=2, exclusive_share=0.5, generator=generator
    )
    assert forest.parent.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert forest.children.tolist()[:5] == [[2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert int(forest.is_exclusive.sum()) == 2  # half of five
    assert forest.n_levels == 2


def test_magnitudes_have_the_means_and_deviations_that_were_asked_for():
    world = small(probabilities=(0.5,), trees=0, correlation_rank=0, magnitude_sd_spread=0.0)
    codes = codes_of(world)
    for feature, mean in ((0, 5.0), (63, 4.0)):
        values = codes[:, feature][codes[:, feature] > 0]
        assert float(values.mean()) == pytest.approx(mean, abs=0.02)
        assert float(values.std()) == pytest.approx(0.5, rel=0.03)
    assert small().firing.features.sd.std() > 0.2


def test_children_are_scaled_by_their_parents():
    world = small(magnitude_sd=1.0, magnitude_sd_spread=0.0, first_magnitude=3.0)
    codes, plain = codes_of(world), codes_of(small(scaled_by_parent=False))
    child, parent = int(world.firing.forest.children[0, 0]), 0
    both = codes[codes[:, child] > 0]
    assert torch.corrcoef(both[:, [parent, child]].T)[0, 1] > 0.3
    both = plain[plain[:, child] > 0]
    assert torch.corrcoef(both[:, [parent, child]].T)[0, 1].abs() < 0.1


def test_features_correlate_as_their_loadings_say():
    world = small(trees=0, probabilities=(0.3,), correlation_rank=2, correlation_scale=0.5)
    law = world.firing.features
    own = 1 / (1 + law.loading.square().sum(1))  # variance of the part of its own
    latent = (law.loading @ law.loading.T) * (own[:, None] * own).sqrt()
    latent -= torch.diag(latent.diag())
    found = firing_correlation(codes_of(world)).float()
    assert torch.corrcoef(torch.stack([latent.flatten(), found.flatten()]))[0, 1] > 0.98
    alone = small(trees=0, probabilities=(0.3,), correlation_rank=0)
    assert firing_correlation(codes_of(alone)).abs().max() < 0.03


def test_directions_become_nearly_orthogonal():
    def drawn(kind, steps=0, d_in=24):
        generator = torch.Generator().manual_seed(0)
        return draw_directions(kind, 40, d_in, steps=steps, lr=3e-3, generator=generator)

    random, near = drawn("random"), drawn("near_orthogonal", 200)
    assert mean_max_cosine(near) < 0.7 * mean_max_cosine(random)
    assert near.norm(dim=1).sub(1).abs().max() < 1e-6
    orthonormal = drawn("orthonormal", d_in=40)
    assert torch.allclose(orthonormal @ orthonormal.T, torch.eye(40), atol=1e-5)
    with pytest.raises(ValueError, match=r"at most `world.d_in`; got 40 and 24"):
        drawn("orthonormal")


def test_orthogonalising_follows_the_gradient_of_its_loss():
    """The Gram form and autograd over the (n, n) cosines take the same steps."""
    generator = torch.Generator().manual_seed(0)
    start = draw_directions("random", 40, 24, steps=0, lr=0.0, generator=generator)
    weights = start.double().clone().requires_grad_()
    optimiser = torch.optim.Adam([weights], lr=3e-3)
    for _ in range(10):
        cosines = weights @ weights.T
        squares = cosines.diag()
        off = cosines.square().sum() - squares.square().sum()
        optimiser.zero_grad()
        (off + len(weights) * (squares - 1).square().sum()).backward()
        optimiser.step()
    expected = torch.nn.functional.normalize(weights.detach(), dim=1)
    generator = torch.Generator().manual_seed(0)
    found = draw_directions("near_orthogonal", 40, 24, steps=10, lr=3e-3, generator=generator)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_merging_keeps_every_part_in_order():
    generator = torch.Generator().manual_seed(0)

    def part(m: int) -> Fired:
        rows = torch.randint(0, 7, (m,), generator=generator).sort().values
        return Fired(rows, torch.arange(m), torch.rand(m, generator=generator))

    parts = [part(m) for m in (9, 0, 4, 13)]
    found = merged(parts, 7)
    order = torch.cat([p.rows for p in parts]).argsort(stable=True)
    assert torch.equal(found.features, torch.cat([p.features for p in parts])[order])
    assert torch.equal(found.values, torch.cat([p.values for p in parts])[order])
    assert torch.equal(found.rows, torch.cat([p.rows for p in parts])[order])


def test_the_matryoshka_toy_is_the_published_one():
    world = make_world(WorldConfig(name="matryoshka_toy"))
    assert torch.allclose(world.directions @ world.directions.T, torch.eye(20), atol=1e-5)
    assert (world.bias == 0).all()
    codes = codes_of(world)
    found = rates(codes)
    asked = torch.tensor([0.15] * 3 + [0.15 * 0.2] * 9 + [0.05] * 8, dtype=torch.float64)
    assert deviations(found, asked, N).abs().max() < 4.5
    is_on = codes > 0
    assert not (is_on[:, 3:6].any(1) & ~is_on[:, 0]).any()
    assert is_on[:, 3:6].sum(1).max() == 1
    share = 1 - is_on[is_on[:, 0]][:, 3:6].any(1).double().mean()
    assert float(share) == pytest.approx(0.4, abs=0.025)
    # binary, times the features' norms
    norms = codes.amax(0)
    assert ((codes == 0) | (codes - norms).abs().lt(1e-6)).all()
    assert 0.005 < float(norms.std()) < 0.12


@pytest.mark.parametrize(
    ("name", "reduced"), [("synth_16k", {"n_features": 2048, "d_in": 96, "trees": 16})]
)
def test_the_large_preset_in_small(name: str, reduced: dict):
    world = make_world(WorldConfig(name=name, **reduced, orthogonal_steps=5))
    assert world.cfg.commonest == 0.4
    assert world.firing.forest.top.numel() == 2048 - 16 * 84
    codes = codes_of(world, 4000)
    assert 5 < float((codes > 0).sum(1).float().mean()) < 20
