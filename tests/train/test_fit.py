"""`sae.fit`: a dictionary of any activations, by the same trainer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from sae.stream.source import NonFiniteActivationsError
from sae.train.tracking import read_metrics

QUICK = {"d_sae": 48, "k": 2, "batch_tokens": 256, "progress": False}

RELU = {**QUICK, "activation": "relu", "step": "autograd"}


def fvu(coder: sae.SparseCoder, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((x - coder(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def test_fit_learns_and_works_on_raw_activations(activations: torch.Tensor, tmp_path: Path):
    coder = sae.fit(activations, tokens=120_000, **QUICK)
    assert fvu(coder, activations) < 0.1
    assert fvu(coder, activations) < 0.5 * fvu(
        sae.fit(activations, tokens=2_000, **QUICK), activations
    )
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(48))
    coder.save(str(tmp_path / "d"))
    assert torch.equal(sae.load(tmp_path / "d")(activations), coder(activations))


def test_relu_fits_too(activations: torch.Tensor):
    coder = sae.fit(activations, tokens=120_000, sparsity_coefficient=0.02, lr=3e-3, **RELU)
    assert fvu(coder, activations) < 0.3
    sparser = sae.fit(activations, tokens=120_000, sparsity_coefficient=0.2, lr=3e-3, **RELU)
    assert (sparser.encode(activations) != 0).sum() < (coder.encode(activations) != 0).sum()


def test_kinds_of_input_train_the_same_coder(activations: torch.Tensor, tmp_path: Path):
    np.save(tmp_path / "x.npy", activations.numpy())
    kinds = [activations, activations.numpy(), tmp_path / "x.npy", str(tmp_path / "x.npy")]
    coders = [sae.fit(kind, tokens=1_024, **QUICK) for kind in kinds]
    for coder in coders[1:]:
        assert torch.equal(coder.W_enc, coders[0].W_enc)
    streamed = sae.fit(iter(activations.split(100)), tokens=1_024, **QUICK)
    assert streamed.d_in == 16


def test_the_global_generator_is_left_alone(activations: torch.Tensor):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sae.fit(activations, tokens=512, **QUICK)
    assert torch.equal(before, torch.get_rng_state())


def test_scaling_the_data_scales_the_reconstruction(activations: torch.Tensor):
    """The input scale is taken out while training, so units do not matter."""
    coder = sae.fit(activations, tokens=2_560, **QUICK)
    tiny = sae.fit(activations * 1e-3, tokens=2_560, **QUICK)
    torch.testing.assert_close(
        tiny(activations * 1e-3) * 1e3, coder(activations), rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", 1e-4),
        ("adam_betas", (0.5, 0.9)),
        ("warmup_fraction", 0.5),
        ("decay_fraction", 0.9),
        ("grad_clip_norm", 1e-4),
        ("batch_tokens", 128),
        ("grad_accumulation_steps", 2),
        ("mixed_precision", "bf16"),
        ("adam_moments", "bf16"),
        ("adam_moments", "8bit"),
        ("seed", 1),
        ("normalisation", "none"),
        ("normalisation", "standardise"),
        ("normalisation", "whiten"),
        ("normalisation", "layer_norm"),
        ("k", 3),
        ("b_dec_init", "zeros"),
        ("activation", "relu"),
    ],
)
@pytest.mark.filterwarnings("ignore:The fused training step does not train")
def test_each_setting_changes_the_outcome(activations: torch.Tensor, setting: str, value: object):
    coder = sae.fit(activations, tokens=2_560, **QUICK)
    other = sae.fit(activations, tokens=2_560, **{**QUICK, setting: value})
    assert not torch.equal(coder.W_enc, other.W_enc)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("k_aux", 0),
        ("aux_coefficient", 1.0),
        ("dead_after_tokens", 4096),
        ("dead_refresh_steps", 1),
    ],
)
def test_each_dead_latent_setting_changes_the_outcome(
    activations: torch.Tensor, setting: str, value: object
):
    few_fire = {**QUICK, "d_sae": 512, "dead_after_tokens": 256, "dead_refresh_steps": 3}
    coder = sae.fit(activations, tokens=5_120, **few_fire)
    other = sae.fit(activations, tokens=5_120, **{**few_fire, setting: value})
    assert not torch.equal(coder.W_enc, other.W_enc)


def test_auxk_revives_dead_latents(
    activations: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Half of the latents start below all others: without AuxK none of them ever fires."""
    honest = sae.SparseCoder.create

    def handicapped(*args, **kwargs):
        coder = honest(*args, **kwargs)
        with torch.no_grad():
            coder.b_enc[24:] = -1.5
        return coder

    monkeypatch.setattr(sae.SparseCoder, "create", handicapped)
    n_alive, dead_share = {}, {}
    for k_aux in (0, 8):
        folder = tmp_path / str(k_aux)
        settings = {**QUICK, "dead_after_tokens": 8192, "k_aux": k_aux, "folder": str(folder)}
        coder = sae.fit(activations, tokens=100_000, **settings)
        n_alive[k_aux] = int((coder.encode(activations) != 0).any(0)[24:].sum())
        dead_share[k_aux] = read_metrics(folder)[-1]["dead_share"]
    assert n_alive[0] == 0
    assert n_alive[8] >= 4
    assert dead_share[8] < dead_share[0] == 0.5


def test_gradient_accumulation_is_the_same_step(activations: torch.Tensor):
    whole = sae.fit(activations, tokens=2_560, **QUICK)
    parts = sae.fit(activations, tokens=2_560, grad_accumulation_steps=4, **QUICK)
    torch.testing.assert_close(parts.W_enc, whole.W_enc, rtol=1e-3, atol=1e-4)


def test_a_run_folder_holds_everything(activations: torch.Tensor, tmp_path: Path):
    coder = sae.fit(
        activations,
        tokens=2_560,
        folder=str(tmp_path / "run"),
        keep_checkpoints=2,
        log_every_steps=4,
        checkpoint_every_steps=2,
        **QUICK,
    )
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "env.json", "metrics.jsonl", "checkpoints", "final"}
    steps = [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert steps == ["step_00000008", "step_00000010"]
    assert torch.equal(sae.load(tmp_path / "run").W_enc, coder.W_enc)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 64, "d_sae": 32}, "got k=64, d_sae=32"),
        ({"learning_rate": 1.0}, "Did you mean `lr`|every key"),
        ({"d_see": 3}, "Did you mean `d_sae`"),
        ({"batch_tokens": 255, "grad_accumulation_steps": 2}, "must be a multiple"),
    ],
)
def test_wrong_arguments(activations: torch.Tensor, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        sae.fit(activations, tokens=1_000, **{"progress": False, **arguments})


def test_constant_and_broken_activations_are_refused(activations: torch.Tensor):
    with pytest.raises(ValueError, match="must differ from one another"):
        sae.fit(torch.ones(100, 4), tokens=1_000, progress=False)
    broken = activations.clone()
    broken[1001] = float("inf")
    with pytest.raises(NonFiniteActivationsError, match="must be finite"):
        sae.fit(broken, tokens=10_000, **QUICK)
    with pytest.raises(ValueError, match="`tokens` must be given"):
        sae.fit(iter([activations]), **QUICK)


def test_activations_that_carry_a_graph_are_taken_as_data(activations: torch.Tensor):
    weight = torch.ones(16, requires_grad=True)
    coder = sae.fit(activations * weight, tokens=1_024, **QUICK)
    assert torch.equal(coder.W_enc, sae.fit(activations, tokens=1_024, **QUICK).W_enc)
    sae.fit(iter((activations * weight).split(256)), tokens=1_024, **QUICK)


def test_an_iterator_is_calibrated_on_more_than_its_first_batch(activations: torch.Tensor):
    rows = sae.fit(iter(activations.split(1)), tokens=1_024, **QUICK)
    whole = sae.fit(iter([activations]), tokens=1_024, **QUICK)
    assert torch.equal(rows.W_enc, whole.W_enc)


def test_what_cannot_work_is_refused_before_training(activations: torch.Tensor, tmp_path: Path):
    with pytest.raises(ValueError, match="checkpoints need"):
        sae.fit(iter([activations]), tokens=1_024, folder=str(tmp_path / "run"), **QUICK)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="`resume` needs a run's folder"):
        sae.fit(activations, tokens=1_024, resume="auto", **QUICK)
    with pytest.raises(ValueError, match="every key must be a setting"):
        sae.fit(activations, tokens=1_024, reuse=3, **QUICK)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs a GPU"):
            sae.fit(activations, tokens=1_024, device="cuda", **QUICK)


def test_a_run_is_not_resumed_on_other_data(activations: torch.Tensor, tmp_path: Path):
    settings = {**QUICK, "tokens": 2_560, "folder": str(tmp_path / "run")}
    sae.fit(activations, **settings)
    for other in (activations[:300], activations + 1):
        with pytest.raises(ValueError, match="on the data it began with"):
            sae.fit(other, resume="auto", **settings)
    sae.fit(activations, resume="auto", **settings)


def test_ctrl_c_without_a_folder_is_an_ordinary_one(
    activations: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    import sae.train.trainer as trainer

    honest, sent = trainer.lr_at, []

    def interrupting(step: int, cfg):
        if step == 2 and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return honest(step, cfg)

    monkeypatch.setattr(trainer, "lr_at", interrupting)
    with pytest.raises(KeyboardInterrupt):
        sae.fit(activations, tokens=5_120, **QUICK)
