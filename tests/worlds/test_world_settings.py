"""Every setting of a world changes the world, and what cannot be is refused."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from world_cases import SMALL, small, small_config

from sae.config import WorldConfig
from sae.worlds import evaluation_generator, make_world, resolve_world

CHANGES = {
    "name": "synth_16k",
    "seed": 1,
    "n_features": 48,
    "d_in": 20,
    "directions": "random",
    "orthogonal_steps": 3,
    "orthogonal_lr": 1e-2,
    "bias_norm": 0.1,
    "norm_spread": 0.2,
    "probabilities": (0.1,),
    "zipf_exponent": 1.0,
    "rarest": 0.05,
    "commonest": 0.3,
    "correlation_rank": 2,
    "correlation_scale": 0.3,
    "trees": 2,
    "branching": 2,
    "depth": 1,
    "exclusive_share": 0.4,
    "compensated": False,
    "scaled_by_parent": False,
    "first_magnitude": 6.0,
    "last_magnitude": 3.0,
    "magnitude_sd": 1.0,
    "magnitude_sd_spread": 0.1,
}
TOY = {"sparsity": 0.5, "importance": 0.5, "toy_steps": 40}


def drawn(cfg: WorldConfig) -> list[torch.Tensor]:
    sample = make_world(cfg).sample(200, evaluation_generator(0))
    return [sample.x, sample.codes]


def test_every_field_is_exercised():
    assert {f.name for f in fields(WorldConfig)} == CHANGES.keys() | TOY.keys()


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "name"])
def test_each_setting_changes_the_samples(name: str):
    pairs = zip(drawn(small_config()), drawn(small_config(**{name: CHANGES[name]})), strict=True)
    changed = [a.shape != b.shape or not torch.equal(a, b) for a, b in pairs]
    assert changed[0]
    is_geometry = name in ("directions", "orthogonal_steps", "orthogonal_lr", "bias_norm", "d_in")
    assert changed[1] != is_geometry


@pytest.mark.parametrize("name", TOY)
def test_each_setting_of_a_toy_model_changes_the_samples(name: str):
    base = {"name": "toy_model", "toy_steps": 20}
    before, after = drawn(WorldConfig(**base)), drawn(WorldConfig(**(base | {name: TOY[name]})))
    assert before[0].shape != after[0].shape or not torch.equal(before[0], after[0])


def test_resolving_fills_every_field_that_the_world_has_and_changes_nothing_twice():
    for settings in (SMALL, {"name": "matryoshka_toy"}, {"name": "toy_model"}):
        once = resolve_world(WorldConfig(**settings))
        assert resolve_world(once) == once
    assert resolve_world(WorldConfig()) == WorldConfig()
    cfg = resolve_world(WorldConfig(name="synth_1k"))
    assert (cfg.n_features, cfg.d_in, cfg.trees, cfg.seed) == (1024, 256, 8, 42)
    once = resolve_world(small_config(probabilities=(0.1,)))
    assert once.zipf_exponent is None
    assert resolve_world(once) == once


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_features": 5}, "`world.n_features` needs a world"),
        ({"name": "synth_1k", "sparsity": 0.5}, "`world.sparsity` must be left out for synth_1k"),
        ({"name": "toy_model", "trees": 5}, "`world.trees` must be left out for toy_model"),
        ({"name": "synth_1k", "probabilities": (0.1, 0.2)}, "one for each of 1024"),
        ({"name": "synth_1k", "probabilities": (0.1,), "rarest": 0.1}, "got both"),
        ({"name": "synth_1k", "rarest": 0.5}, "must be at most `world.commonest`"),
        ({"name": "synth_1k", "n_features": 4}, "`world.trees` must be at most"),
        ({"name": "matryoshka_toy", "rarest": 0.01}, "Zipf's law needs"),
        ({"name": "synth_1k", "branching": 1, "depth": 0}, "`world.depth` must be positive"),
        ({"name": "synth_1k", "probabilities": (1.5,)}, r"must lie in \[0, 1\]"),
        ({"name": "synth_1k", "exclusive_share": 1.5}, "must be at most 1"),
        ({"name": "toy_model", "sparsity": 1.0}, r"must be in \[0, 1\)"),
        ({"name": "synth_1k", "bias_norm": -1.0}, "must not be negative"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        resolve_world(WorldConfig(**settings))


def test_no_world_has_no_world():
    with pytest.raises(ValueError, match="must name a world"):
        make_world(WorldConfig())


def test_a_world_is_made_and_drawn_without_the_global_generator():
    before = torch.get_rng_state()
    small().sample(100, evaluation_generator(0))
    make_world(WorldConfig(name="toy_model", toy_steps=2))
    assert torch.equal(torch.get_rng_state(), before)
