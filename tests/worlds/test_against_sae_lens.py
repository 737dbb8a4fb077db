"""The statistics of our worlds are those of the benchmark's own generator."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from world_cases import deviations, firing_correlation, rates

from sae.config import WorldConfig
from sae.worlds import World, evaluation_generator, make_world
from sae.worlds.geometry import mean_max_cosine

pytestmark = [
    pytest.mark.sae_lens,
    pytest.mark.skipif(
        importlib.util.find_spec("sae_lens") is None, reason="sae-lens not installed"
    ),
]
N = 40_960


def reference(world: World) -> Any:
    """Return sae-lens's model of a world's settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens.synthetic as theirs  # pyright: ignore[reportMissingImports]
    cfg = world.cfg
    assert cfg.magnitude_sd is not None
    return theirs.SyntheticModel(
        theirs.SyntheticModelConfig(
            num_features=cfg.n_features,
            hidden_dim=cfg.d_in,
            firing_probability=theirs.ZipfianFiringProbabilityConfig(
                exponent=cfg.zipf_exponent, max_prob=cfg.commonest, min_prob=cfg.rarest
            ),
            hierarchy=theirs.HierarchyConfig(
                total_root_nodes=cfg.trees,
                branching_factor=cfg.branching,
                max_depth=cfg.depth,
                mutually_exclusive_portion=cfg.exclusive_share,
                compensate_probabilities=cfg.compensated,
                scale_children_by_parent=cfg.scaled_by_parent,
            ),
            orthogonalization=theirs.OrthogonalizationConfig(
                num_steps=cfg.orthogonal_steps, lr=cfg.orthogonal_lr
            ),
            correlation=theirs.LowRankCorrelationConfig(
                rank=cfg.correlation_rank, correlation_scale=cfg.correlation_scale
            ),
            std_firing_magnitudes=theirs.FoldedNormalMagnitudeConfig(
                mean=cfg.magnitude_sd, std=cfg.magnitude_sd_spread
            ),
            mean_firing_magnitudes=theirs.LinearMagnitudeConfig(
                cfg.first_magnitude, cfg.last_magnitude
            ),
            bias=cfg.bias_norm,
            seed=cfg.seed,
        )
    )


def show(text: str) -> None:
    """Print what was measured; `pytest -s` shows it."""
    print(text)  # noqa: T201


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(WorldConfig(name="synth_1k"))


@pytest.fixture(scope="module")
def codes(world: World) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Codes of N samples, ours and theirs, and their model."""
    model = reference(world)
    ours = world.sample(N, evaluation_generator(0)).codes
    state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = torch.cat([model.activation_generator.sample(4096) for _ in range(N // 4096)])
    torch.set_rng_state(state)
    return ours, theirs, model


def test_the_world_itself_is_theirs(world: World, codes):
    model = codes[2]
    generator, law = model.activation_generator, world.firing.features
    assert torch.allclose(law.probability, generator.firing_probabilities, rtol=1e-5)
    assert torch.allclose(law.mean, generator.mean_firing_magnitudes)
    assert torch.allclose(law.sd, generator.std_firing_magnitudes)
    theirs = model.feature_dict
    assert torch.allclose(world.directions, theirs.feature_vectors.detach(), atol=2e-3)
    assert torch.allclose(world.bias, theirs.bias.detach(), atol=1e-6)
    cosines = [mean_max_cosine(g) for g in (world.directions, theirs.feature_vectors.detach())]
    show(f"mean max cosine {cosines[0]:.4f}, theirs {cosines[1]:.4f}")
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-3)
    x = world.sample(10, evaluation_generator(0))
    assert torch.allclose(x.x, theirs(x.codes), atol=2e-2)


def test_features_fire_as_often_and_as_strongly(codes):
    ours, theirs, _ = codes
    apart = deviations(rates(ours), rates(theirs), N) / 2**0.5
    l0 = [float((c > 0).sum(1).double().mean()) for c in (ours, theirs)]
    l0_256 = [float((c[:, :256] > 0).sum(1).double().mean()) for c in (ours, theirs)]
    sizes = [float(c[c > 0].double().mean()) for c in (ours, theirs)]
    show(f"L0 {l0}, of the first 256 {l0_256}, mean magnitude {sizes}")
    show(f"rates apart: mean square {float(apart.square().mean()):.3f} standard errors")
    assert l0[0] == pytest.approx(l0[1], rel=0.01)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    often = rates(theirs) * N > 100
    assert float(apart[often].square().mean()) == pytest.approx(1, abs=0.25)
    for power in (1, 2):
        one, other = ours[:, often].double() ** power, theirs[:, often].double() ** power
        error = ((one.var(0) + other.var(0)) / N).sqrt()
        assert ((one.mean(0) - other.mean(0)) / error).square().mean() < 1.3


def test_features_fire_together_as_often(world: World, codes):
    ours, theirs, _ = codes
    common = slice(0, 200)
    a, b = (firing_correlation(c[:, common]) for c in (ours, theirs))
    apart = float((a - b).square().mean().sqrt()) * (N / 2) ** 0.5
    show(
        f"correlations of what fires: rms {float(a.square().mean().sqrt()):.4f} "
        f"and {float(b.square().mean().sqrt()):.4f}, apart {apart:.3f} standard errors"
    )
    assert apart < 1.2
    assert float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) > 0.9
    forest = world.firing.forest
    for c in (ours, theirs):
        siblings = forest.children[forest.is_exclusive]
        assert int((c[:, siblings] > 0).sum(2).max()) == 1
