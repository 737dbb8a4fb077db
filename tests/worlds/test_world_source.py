"""Training rows: their order follows from (seed, position), processes divide it, runs resume."""

from __future__ import annotations

import json

import pytest
import torch
from world_cases import small

from sae.stream.source import SourceState
from sae.worlds import World, WorldSource, evaluation_generator
from sae.worlds import seeds as seeds_module

ALWAYS = {"probabilities": (0.4,), "trees": 0}


@pytest.fixture(scope="module")
def world() -> World:
    """A world in which some feature always fires, so that no two rows are equal."""
    return small(**ALWAYS)


def test_batches_follow_from_seed_and_position(world: World):
    one, other = WorldSource(world, seed=3), WorldSource(world, seed=3)
    whole = one.next_batch(3000)
    pieces = [other.next_batch(n) for n in (1, 999, 1500, 500)]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(WorldSource(world, seed=4).next_batch(3000), whole)
    assert len(whole.unique(dim=0)) == 3000
    assert torch.equal(torch.cat([world.training_block(3, i) for i in range(3)])[:3000], whole)


def test_two_processes_divide_the_rows_that_one_takes(world: World):
    whole = WorldSource(world, lanes=(0, 1), n_lanes=2)
    parts = [WorldSource(world, lanes=(lane,), n_lanes=2) for lane in (0, 1)]
    for n in (700, 1400):
        batch = whole.next_batch(2 * n)
        assert torch.equal(torch.cat([part.next_batch(n) for part in parts]), batch)
        assert len(batch.unique(dim=0)) == 2 * n
    with pytest.raises(ValueError, match="multiples of the 2 lanes; got 3"):
        whole.next_batch(3)


def test_a_source_continues_bit_for_bit_and_its_state_is_tiny(world: World):
    source = WorldSource(world, lanes=(0, 1), n_lanes=2)
    source.next_batch(1234)
    state = source.state()
    assert state.tensors == {}
    written = json.dumps(state.position)
    assert len(written) < 400
    expected = source.next_batch(2000)
    again = WorldSource(world, lanes=(0, 1), n_lanes=2)
    again.next_batch(10)
    again.load_state(SourceState(json.loads(written)))
    assert torch.equal(again.next_batch(2000), expected)


@pytest.mark.parametrize(
    "other",
    [
        lambda: WorldSource(small(**ALWAYS, seed=1)),
        lambda: WorldSource(small(**ALWAYS, bias_norm=0.4)),
        lambda: WorldSource(small(**ALWAYS | {"probabilities": (0.3,)})),
        lambda: WorldSource(small(**ALWAYS), seed=1),
        lambda: WorldSource(small(**ALWAYS), n_lanes=2),
    ],
    ids=["seed of the world", "bias", "rates", "seed", "lanes"],
)
def test_the_place_in_another_world_is_refused(world: World, other):
    with pytest.raises(ValueError, match="resumed in the world it began in"):
        other().load_state(WorldSource(world).state())


def test_the_calibration_sample_consumes_nothing_and_is_no_training_data(world: World):
    source = WorldSource(world)
    sample = source.calibration_sample()
    assert sample.shape == (16_384, world.d_in)
    assert torch.equal(source.calibration_sample(), sample)
    batch = source.next_batch(2048)
    assert torch.equal(batch, WorldSource(world).next_batch(2048))
    assert not torch.isin(batch[:, 0], sample[:, 0]).all()
    assert len(torch.cat([batch, sample]).unique(dim=0)) == 2048 + 16_384
    assert not torch.equal(WorldSource(world, seed=1).calibration_sample(), sample)


def test_batches_are_the_rows_of_training(world: World):
    batches = world.batches(300, seed=2)
    rows = torch.cat([next(batches) for _ in range(8)])
    assert torch.equal(rows, WorldSource(world, seed=2).next_batch(2400))


def test_no_two_uses_share_a_seed(monkeypatch: pytest.MonkeyPatch):
    """A CPU generator reads 32 bits: of these training, calibration and evaluation differ."""
    given: list[int] = []
    monkeypatch.setattr(seeds_module, "_generator", lambda seed, _: given.append(seed))
    cpu = torch.device("cpu")
    blocks = [*range(2000), *(1 << power for power in range(11, 29))]
    for block in blocks:
        for lane in range(3):
            seeds_module.training_generator(7, lane, block, 3, cpu)
    assert len(set(given)) == 3 * len(blocks)
    assert max(given) < 2**31
    given.clear()
    for seed in range(200):
        seeds_module.calibration_generator(seed, cpu)
    assert 2**31 <= min(given) <= max(given) < 2**31 + 2**30
    assert len(set(given)) == 200
    given.clear()
    for seed in range(200):
        evaluation_generator(seed)
    assert 2**31 + 2**30 <= min(given) <= max(given) < 2**32
    assert len(set(given)) == 200


def test_metadata_say_which_world(world: World):
    said = json.loads(json.dumps(WorldSource(world).metadata()))["world"]
    assert said["name"] == "synth_1k"
    assert (said["n_features"], said["trees"], said["seed"]) == (64, 0, 42)
    assert "sparsity" not in said
