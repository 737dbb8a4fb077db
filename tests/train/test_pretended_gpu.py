"""Training and evaluating on a GPU that is only pretended (`pretended_gpu`): no device meets the
other, and no step waits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pretended_gpu
import pytest
import torch
from pretended_gpu import Gpu, in_step
from step_states import inputs_of, make
from torch import Tensor

import sae
from sae.coder.step_values import StepValues
from sae.configuration import from_command_line, from_flat
from sae.evals.inputs import activation_contexts
from sae.evals.run import evaluate
from sae.train import run
from sae.train.schedule import drawn_prefixes
from sae.train.tracking import read_metrics

MANY_DEAD = {"coder.k_aux": 4, "train.dead_after_tokens": 300}


@pytest.fixture(autouse=True)
def gpu():
    """Pretend."""
    with pretended_gpu.pretended_gpu():
        yield


def test_it_refuses_and_notes_what_a_gpu_would():
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    assert isinstance(x + 1, Gpu)
    assert isinstance(y.to("cuda"), Gpu)
    assert not isinstance(x.cpu(), Gpu)
    with pytest.raises(RuntimeError, match="same device"):
        x + y
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3).index_put_((x.long(),), y)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="other device"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    assert pretended_gpu.waits == []
    with in_step():
        for waits in (x.sum().item, lambda: x[x > 0], lambda: torch.tensor(1.0, device="cuda")):
            before = len(pretended_gpu.waits)
            waits()
            assert len(pretended_gpu.waits) > before


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("fused", {"train.mixed_precision": "bf16", **MANY_DEAD}),
    "prefixes": ("fused", {"coder.random_prefixes": 3, "train.adam_moments": "8bit"}),
    "clipped": ("fused", {"coder.activation": "batchtopk", "train.grad_clip_norm": 0.1}),
    "micro-batches": ("fused", {"train.grad_accumulation_steps": 2, **MANY_DEAD}),
    "autograd": ("autograd", MANY_DEAD),
    "autograd, micro-batches": ("autograd", {"train.grad_accumulation_steps": 2}),
    "autograd, 8 bits": (
        "autograd",
        {"train.grad_accumulation_steps": 2, "train.adam_moments": "8bit"},
    ),
    "jumprelu": (
        "autograd",
        {"coder.activation": "jumprelu", "coder.target_l0": 4.0, "coder.dead_penalty": 1e-3},
    ),
    "muon": ("autograd", {"train.optimizer": "muon", **MANY_DEAD}),
    "signum": ("autograd", {"train.optimizer": "signum", "coder.activation": "gated"}),
}


@pytest.mark.parametrize(("step", "settings"), STEPS.values(), ids=STEPS.keys())
def test_no_step_waits_for_the_device(activations: Tensor, step: str, settings: dict[str, Any]):
    n_micro = settings.get("train.grad_accumulation_steps", 1)
    state, take = make(activations[:1024], step, cpu=False, **settings)
    values = StepValues.fixed(state.coder.cfg)
    if n := settings.get("coder.random_prefixes"):
        values = StepValues(k=4, prefixes=drawn_prefixes(n, state.coder.d_sae, "a seed"))
    before = state.coder.W_dec.detach().clone()
    for _ in range(3):
        inputs = inputs_of(state, n_micro, 256 // n_micro)
        with in_step():
            take(inputs, 1e-3, values)
        state.step += 1
        state.dead.refresh(state.tokens_seen)
    assert pretended_gpu.waits == []
    assert all(isinstance(tensor, Gpu) for tensor in state.tensors().values())
    assert not torch.equal(before, state.coder.W_dec)


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "sae": (
        1,
        {
            **{"activation": "batchtopk", "normalisation": "standardise"},
            **{"resample_every_tokens": 512, "ema_decay": 0.9},
        },
    ),
    "transcoder": (
        2,
        {"site": "transcoder", "skip": True, "normalisation": "whiten", "step": "autograd"},
    ),
    "cross-layer": (4, {"site": "cross_layer", "tie_decoders": True, "step": "autograd"}),
}


@pytest.mark.parametrize(("n_places", "settings"), RUNS.values(), ids=RUNS.keys())
def test_a_run_is_saved_resumed_and_measured(
    activations: Tensor, n_places: int, settings: dict[str, Any], tmp_path: Path
):
    places = [activations[:1024].roll(i, 1) for i in range(n_places)]
    for _ in range(2):
        coder = sae.fit(
            places if n_places > 1 else places[0],
            **{"d_sae": 64, "k": 4, "tokens": 4 * 256, "batch_tokens": 256, "lr": 1e-3},
            **{"checkpoint_every_steps": 2, "dead_after_tokens": 300, "progress": False},
            **{"folder": str(tmp_path / "run"), "device": "cuda", "resume": "auto", **settings},
        )
        shutil.rmtree(tmp_path / "run" / "final")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    x = torch.cat(places, 1).to("cuda")
    contexts = activation_contexts(x[:300].split(100))
    found = evaluate(coder, contexts, names=["reconstruction", "sparsity"], n_resamples=10)
    assert isinstance(coder.b_dec, Gpu)
    assert {"reconstruction", "sparsity"} <= found.evals.keys()


def test_a_coder_on_a_gpu_trains_by_what_a_model_on_the_cpu_loses(tiny_config: Path):
    cfg = from_flat(
        {
            **{"run.device": "cuda", "model.device": "cpu", "stream.normalisation": "layer_norm"},
            **{
                "train.tokens": 3 * 128,
                "train.checkpoint_every_steps": 3,
                "train.step": "autograd",
            },
            **{
                "train.model_loss": "kl",
                "train.model_loss_fraction": 1.0,
                "train.model_loss_contexts": 2,
            },
        },
        from_command_line([str(tiny_config)], "sae train"),
    )
    (row,) = read_metrics(run(cfg))
    assert row["model"] > 0
