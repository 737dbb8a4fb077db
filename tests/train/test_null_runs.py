"""Null dictionaries, each made by one flag of the trainer: it changes what it names, alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import sae
from sae.coder.sites import Sites
from sae.config import CoderConfig, Config, TrainConfig
from sae.configuration import from_command_line
from sae.stream.arrays import open_source
from sae.stream.language_model import load_language_model
from sae.train import run
from sae.train.null_inputs import as_trained_on
from sae.train.run import resolve
from sae.train.trainer import make_state

ROWS = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    3, 16, generator=torch.Generator().manual_seed(1)
)  # rank 3: dimensions have much in common


def trained(path: Path, name: str, *flags: str) -> Path:
    folder = str(path.parent / name)
    return run(from_command_line([str(path), *flags, "--run.folder", folder], "sae train"))


def fitted(**options: Any) -> sae.SparseCoder:
    return sae.fit(
        ROWS, d_sae=32, k=4, tokens=100_000, batch_tokens=256, lr=3e-3, progress=False, **options
    )


@pytest.mark.parametrize("optimizer", ["adam", "muon", "signum"])
def test_a_frozen_decoder_stays_where_it_began_while_the_encoder_learns(optimizer: str) -> None:
    frozen = fitted(freeze_decoder=True, step="autograd", optimizer=optimizer)
    source = open_source(ROWS)
    cfg = Config(coder=CoderConfig(d_sae=32, k=4))
    sites = Sites.of(cfg.coder, source.widths)
    cpu = torch.device("cpu")
    start = make_state(resolve(cfg, sites, None, cpu), source, Accelerator(cpu=True)).coder
    torch.testing.assert_close(frozen.W_dec, start.W_dec, rtol=0, atol=1e-6)
    assert not torch.allclose(frozen.W_enc, start.W_enc, atol=1e-2)


def fvu(coder: sae.SparseCoder) -> float:
    with torch.no_grad():
        return float((ROWS - coder(ROWS)).square().sum() / (ROWS - ROWS.mean(0)).square().sum())


def test_a_frozen_decoder_is_worse_than_a_learned_one() -> None:
    assert fvu(fitted(freeze_decoder=True, step="autograd")) > 2 * fvu(fitted(step="autograd"))


def test_shuffled_dimensions_keep_their_values_and_lose_what_they_share() -> None:
    cfg = TrainConfig(tokens=4096, shuffle_dimensions=True)
    x, again, later = (as_trained_on(ROWS, cfg, 0, step) for step in (3, 3, 4))
    assert torch.equal(x, again)
    assert not torch.equal(x, later)
    assert torch.equal(x.sort(0).values, ROWS.sort(0).values)
    assert torch.corrcoef(ROWS.T).fill_diagonal_(0).abs().max() > 0.5
    assert torch.corrcoef(x.T).fill_diagonal_(0).abs().max() < 0.15


def test_training_on_shuffled_dimensions_learns_nothing_of_the_real_ones() -> None:
    assert fvu(fitted(shuffle_dimensions=True)) > 3 * fvu(fitted())


def test_shuffled_runs_resume_and_fleets_see_the_same_rows(tiny_config: Path) -> None:
    flag = ("--train.shuffle_dimensions",)
    alone = trained(tiny_config, "alone", *flag)
    trained(tiny_config, "fleet", *flag, "--fleet.k", "4,5")
    member = next(f for f in (tiny_config.parent / "fleet").iterdir() if f.name == "k4")
    k4 = trained(tiny_config, "k4", *flag, "--coder.k", "4")
    assert torch.allclose(sae.load(k4).W_enc, sae.load(member).W_enc, atol=1e-5)
    assert not torch.equal(sae.load(alone).W_enc, sae.load(trained(tiny_config, "plain")).W_enc)


def test_a_reinitialised_model_has_its_own_weights_by_seed(tiny_config: Path) -> None:
    cfg = from_command_line([str(tiny_config)], "sae train").model

    def weights(**changes: Any) -> torch.Tensor:
        state = torch.random.get_rng_state()
        lm = load_language_model(replace(cfg, **changes), "cpu")
        assert torch.equal(state, torch.random.get_rng_state())
        return torch.cat([p.flatten().float() for p in lm.module.parameters()])

    kept, drawn = weights(), weights(reinitialised=3)
    assert drawn.shape == kept.shape
    assert not torch.equal(drawn, kept)
    assert torch.equal(drawn, weights(reinitialised=3))
    assert not torch.equal(drawn, weights(reinitialised=4))


def test_a_dictionary_of_a_reinitialised_model_remembers_it(tiny_config: Path) -> None:
    folder = trained(tiny_config, "null", "--model.reinitialised", "7")
    assert sae.load(folder).metadata["model_reinitialised"] == 7
    assert "model_reinitialised" not in sae.load(trained(tiny_config, "plain")).metadata
