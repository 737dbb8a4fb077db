"""The stacked step takes its coders where each one's own step takes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from step_states import BATCH, D_IN, inputs_of, make, resolved
from torch import Tensor

import sae
from sae.coder.step_values import StepValues
from sae.stream.arrays import open_source
from sae.stream.normalisation import Normaliser
from sae.train import fleet_groups, stacked_step
from sae.train.adam import AdamState
from sae.train.dead import DeadLatents
from sae.train.fleet_groups import Trainee, make_groups
from sae.train.latent_rows import reset_latents_
from sae.train.metrics import MetricSums
from sae.train.stacked_step import StackedStep, can_stack
from sae.train.state import Calibration, TrainState
from sae.train.trainer import make_state
from sae_kernels import decode_loss, fused_update, row_topk
from sae_kernels.launching import HAS_TRITON, record_launches

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EQUAL_K = [{"coder.k": 2, "run.seed": seed} for seed in range(3)]
# k 1 has no gradient at the start but rounding, which Adam blows up.
OF_MANY_K = [{"coder.k": 2}, {"coder.k": 3}, {"coder.k": 4, "coder.signed": True}]
BATCHED = [{"coder.activation": "batchtopk", "coder.k": k} for k in (2, 3)]
MIXED = [*OF_MANY_K[:2], *BATCHED]
RATES = (1e-3, 3e-3, 5e-4, 2e-3)


def fleet_states(activations: Tensor, changes: list[dict], *, cpu: bool = True, **shared: Any):
    """Return configurations and states as a fleet makes them: one calibration for all."""
    accelerator, cfgs, states = Accelerator(cpu=cpu), [], []
    for own in changes:
        cfg = resolved({"train.step": "fused", **shared, **own})
        source = make(activations, "fused")[0].source
        calibration = states[0].calibration if states else None
        cfgs.append(cfg)
        states.append(make_state(cfg, source, accelerator, calibration))
    return cfgs, states, accelerator


def train_stacked(
    activations: Tensor, changes: list[dict], *, n_steps: int = 12, **shared: Any
) -> list[TrainState]:
    cfgs, states, accelerator = fleet_states(activations, changes, **shared)
    step = StackedStep(cfgs, states, accelerator)
    for i in range(n_steps):
        if i % 3 == 0:
            for state in states:
                state.dead.refresh(state.tokens_seen)
        values = [StepValues.fixed(cfg.coder) for cfg in cfgs]
        step(inputs_of(states[0], 1, BATCH), RATES[: len(cfgs)], values)
        for state in states:
            state.step += 1
    return states


def train_alone(
    activations: Tensor, own: dict, lr: float, *, n_steps: int = 12, **shared: Any
) -> TrainState:
    state, step = make(activations, "fused", **{**shared, **own})
    for i in range(n_steps):
        if i % 3 == 0:
            state.dead.refresh(state.tokens_seen)
        step(inputs_of(state, 1, BATCH), lr)
        state.step += 1
    return state


@pytest.mark.parametrize("fitting", [1, 2, 9], ids=lambda n: f"{n} at once")
@pytest.mark.parametrize(
    "changes", [EQUAL_K, OF_MANY_K, BATCHED, MIXED], ids=["equal k", "many k", "batched", "mixed"]
)
def test_it_agrees_with_separate_steps(
    activations: Tensor, monkeypatch: pytest.MonkeyPatch, changes: list[dict], fitting: int
):
    """Weights, moments, thresholds, counters and the log, each coder at its own rate."""
    dying = {"train.dead_after_tokens": 256}
    monkeypatch.setattr(stacked_step, "BUFFER_BYTES", fitting * BATCH * 64 * 4)
    stacked = train_stacked(activations, changes, **dying)
    assert any(state.dead.indices.numel() for state in stacked), "AuxK has something to do"
    for state, own, lr in zip(stacked, changes, RATES, strict=False):
        alone = train_alone(activations, own, lr, **dying)
        want = {**alone.tensors(), **alone.own_tensors()}
        found = {**state.tensors(), **state.own_tensors()}
        assert found.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=2e-6)
        rows = state.metrics.compute(), alone.metrics.compute()
        assert rows[0] == pytest.approx(rows[1], rel=1e-5)


def test_shadows_follow_replaced_weights(activations: Tensor):
    cfgs, states, accelerator = fleet_states(
        activations, EQUAL_K, **{"train.mixed_precision": "bf16"}
    )
    step = StackedStep(cfgs, states, accelerator)
    with torch.no_grad():
        states[1].coder.W_enc[3] = 5.0
    reset_latents_(states[1], torch.tensor([3]))
    step.weights_changed()
    assert step.dictionary.enc_shadow is not None
    assert step.dictionary.W_enc[64 + 3].eq(5).all(), "the coder's weights are the stack's"
    assert step.dictionary.enc_shadow[64 + 3].eq(5).all()


@pytest.mark.parametrize(
    "change",
    [
        {"train.adam_moments": "8bit"},
        {"train.grad_clip_norm": 1.0},
        {"train.grad_accumulation_steps": 2},
        {"coder.prefixes": (8,)},
        {"coder.d_sae": 40},
        {"train.step": "autograd"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_others_step_alone(change: dict):
    assert can_stack(resolved({"train.step": "fused"}))
    assert not can_stack(resolved({"train.step": "fused", **change}))


def test_what_is_alike_is_one_group(activations: Tensor, monkeypatch: pytest.MonkeyPatch):
    changes = [{}, {"coder.k": 2}, {"coder.d_sae": 32}, {"train.step": "autograd"}]
    cfgs, states, accelerator = fleet_states(activations, changes)
    trainees = [
        Trainee(str(i), *pair, place=0) for i, pair in enumerate(zip(cfgs, states, strict=True))
    ]
    assert len(make_groups(trainees, accelerator)) == 4, "on a CPU each is alone"
    monkeypatch.setattr(fleet_groups, "stacks", lambda _: True)
    names = [[t.name for t in group.trainees] for group in make_groups(trainees, accelerator)]
    assert sorted(names) == [["0", "1"], ["2"], ["3"]]


@needs_triton
def test_no_stacked_step_reads_from_the_device(monkeypatch: pytest.MonkeyPatch):
    """On meta tensors, which have no data, whatever waits for a number fails."""
    for module in (decode_loss, fused_update, row_topk):
        monkeypatch.setattr(module, "choose_form", lambda *_: "triton")
    meta = torch.device("meta")
    shared = {"train.mixed_precision": "bf16", "train.step": "fused"}
    cfgs = [resolved({**shared, **own}) for own in ({}, {"coder.k": 2})]
    accelerator: Any = SimpleNamespace(device=meta, num_processes=1)
    source = open_source(torch.zeros(8, D_IN))
    with meta:
        step = StackedStep(cfgs, [meta_state(cfg, source) for cfg in cfgs], accelerator)
        values = [StepValues.fixed(cfg.coder) for cfg in cfgs]
        with record_launches() as launched:
            step([torch.zeros(256, D_IN)], [1e-3, 2e-3], values)
    assert "_update_kernel" in {launch.kernel.fn.__name__ for launch in launched}


def meta_state(cfg: sae.Config, source: Any) -> TrainState:
    """Return a state without data, in which five latents are dead."""
    coder, mean = sae.SparseCoder(D_IN, cfg.coder), torch.zeros(D_IN)
    dead = DeadLatents(coder.d_sae, dead_after_tokens=1, k_aux=8, device=mean.device)
    dead.indices = torch.zeros(5, dtype=torch.int64)
    return TrainState(
        coder=coder,
        optimiser=AdamState(coder),
        dead=dead,
        metrics=MetricSums(mean, ("loss", "reconstruction", "auxk")),
        source=source,
        calibration=Calibration(Normaliser("none"), 1.0, mean, mean),
        batch_tokens=cfg.train.batch_tokens,
    )


@pytest.mark.gpu
@needs_cuda
def test_a_captured_stacked_step_is_the_step(activations: Tensor):
    """Replayed as a CUDA graph, over changing lists of dead latents, it trains the same coders."""
    states = {}
    for is_captured in (False, True):
        given = {"train.dead_after_tokens": 256, "train.mixed_precision": "bf16"}
        cfgs, states[is_captured], accelerator = fleet_states(
            activations, OF_MANY_K, cpu=False, **given
        )
        step = StackedStep(cfgs, states[is_captured], accelerator)
        step.captured.is_off = not is_captured
        values = [StepValues.fixed(cfg.coder) for cfg in cfgs]
        for i in range(20):
            for state in states[is_captured]:
                if i % 5 == 0:
                    state.dead.refresh(state.tokens_seen)
            step(inputs_of(states[is_captured][0], 1, BATCH), RATES[:3], values)
            for state in states[is_captured]:
                state.step += 1
        assert not is_captured or not step.captured.is_off
    for one, other in zip(*states.values(), strict=True):
        assert torch.equal(one.coder.W_enc, other.coder.W_enc)
        assert torch.equal(one.coder.W_dec, other.coder.W_dec)
