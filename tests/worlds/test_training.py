"""`sae train` on a world, `sae.fit` on its batches, and what a world refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from world_cases import SMALL, small

import sae
from sae.configuration import from_command_line, read_run_config
from sae.stream.harvest import harvest
from sae.train import run
from sae.train.interrupt import Interrupted
from sae.train.plan import plan
from sae.train.tracking import read_metrics
from sae.worlds import evaluation_generator, make_world


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tree = {
        "world": SMALL,
        "coder": {"d_sae": 32, "k": 3},
        "train": {"tokens": 16 * 256, "batch_tokens": 256, "checkpoint_every_steps": 4, "lr": 0.01},
        "run": {"folder": str(tmp_path / "run")},
    }
    path = tmp_path / "world.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def configured(path: Path, *flags: str) -> sae.Config:
    return from_command_line([str(path), *flags], "sae train")


def test_training_on_a_world_writes_a_dictionary_that_knows_it(config: Path):
    folder = run(configured(config))
    coder = sae.load(folder)
    assert coder.W_dec.shape == (32, 24)
    assert coder.metadata["world"]["n_features"] == 64
    rows = read_metrics(folder)
    assert rows[-1]["fvu"] < 0.6
    saved = read_run_config(folder)
    assert saved.world.correlation_rank == 25
    assert (saved.stream.lanes, saved.stream.buffer_tokens) == (1, None)


@pytest.mark.parametrize("flags", [[], ["--stream.lanes", "2"]], ids=["one lane", "two lanes"])
def test_a_stopped_run_goes_on_bit_for_bit(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
):
    whole = run(configured(config, *flags, "--run.folder", str(tmp_path / "whole")))
    from sae.worlds import WorldSource

    plain, count = WorldSource.next_batch, iter(range(100))

    def stopping(self: WorldSource, n: int) -> torch.Tensor:
        if next(count) == 10:
            raise Interrupted(2, is_saved=True)
        return plain(self, n)

    monkeypatch.setattr(WorldSource, "next_batch", stopping)
    with pytest.raises(Interrupted):
        run(configured(config, *flags))
    monkeypatch.setattr(WorldSource, "next_batch", plain)
    again = run(configured(config, *flags, "--train.resume", "auto"))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(sae.load(again), name), getattr(sae.load(whole), name))


@pytest.mark.parametrize(
    "flags",
    [
        "--coder.activation batchtopk",
        "--coder.activation batchtopk --coder.refine_step 0.3 --train.step autograd",
        "--coder.activation jumprelu --coder.target_l0 3 --coder.k 32 --train.step autograd",
    ],
)
def test_the_l0_on_fresh_samples_is_what_was_asked_for(config: Path, flags: str):
    """Though weights still move, and the thresholds of training are behind them."""
    folder = run(configured(config, *flags.split(), "--train.lr", "0.05"))
    world = make_world(read_run_config(folder).world)
    with torch.no_grad():
        code = sae.load(folder).encode(world.sample(30_000, evaluation_generator(0)).x)
    assert float((code != 0).double().sum(1).mean()) == pytest.approx(3, rel=0.02)


def test_fit_takes_the_batches_of_a_world():
    world = small()
    settings = {"d_sae": 32, "k": 3, "lr": 0.01, "batch_tokens": 256, "progress": False}
    coder = sae.fit(world.batches(256, seed=0), tokens=6000, **settings)
    assert coder.W_dec.shape == (32, 24)


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--model.name", "x"], "model.name"),
        (["--data.source", "x"], "data.source"),
        (["--stream.shards", "x"], "stream.shards"),
        (["--stream.buffer_tokens", "100"], "stream.buffer_tokens"),
    ],
)
def test_a_world_beside_a_model_or_text_is_refused(config: Path, flags: list[str], key: str):
    with pytest.raises(ValueError, match=f"`{key}` must be left out where `world.name`"):
        run(configured(config, *flags))


def test_settings_of_a_world_without_one_are_refused(config: Path):
    with pytest.raises(ValueError, match="needs a world"):
        run(configured(config, "--world.name", ""))


def test_what_needs_a_model_refuses_a_world(config: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="`sae plan` must be given a model"):
        plan(configured(config))
    with pytest.raises(ValueError, match="must be empty where a model reads text"):
        harvest(configured(config, "--harvest.folder", str(tmp_path / "shards")))


def test_another_world_cannot_continue_a_run(config: Path):
    run(configured(config))
    with pytest.raises(ValueError, match=r"world.seed was 42, now 43"):
        run(configured(config, "--world.seed", "43", "--train.resume", "auto"))
