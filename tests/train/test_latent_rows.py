"""Latents begun anew, and reordered, in all of the trainer's state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_states import BATCH, inputs_of, make, resolved, train
from torch import Tensor

from sae.train.fused_step import FusedStep
from sae.train.latent_rows import reorder_latents_
from sae.train.resampling import is_due, resample_
from sae.train.state import TrainState

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("fused", {}),
    ("fused", {"train.adam_moments": "8bit", "train.ema_decay": 0.9}),
    ("autograd", {"train.optimizer": "muon"}),
    ("autograd", {"train.optimizer": "signum"}),
    ("autograd", {"coder.activation": "jumprelu", "coder.k_aux": 8}),
    ("autograd", {"coder.activation": "gated"}),
    ("autograd", {"coder.activation": "matching_pursuit", "coder.k_aux": None}),
]


def some_dead(activations: Tensor, by: str, **settings: Any) -> tuple[TrainState, Tensor]:
    """Return a trained state, in which latents 3, 11 and 40 have long not fired, and a batch."""
    state, _ = train(activations, by, 3, **settings)
    state.dead.last_fired_at.fill_(state.tokens_seen)
    state.dead.last_fired_at[torch.tensor([3, 11, 40])] = torch.tensor([2, 1, 3])
    state.dead.dead_after_tokens = state.tokens_seen - 10
    return state, inputs_of(state, 1, BATCH)[0]


@pytest.mark.parametrize(("by", "settings"), KINDS)
def test_resampling_begins_dead_latents_anew(
    activations: Tensor, by: str, settings: dict[str, Any]
):
    state, x = some_dead(activations, by, **settings)
    coder = state.coder
    before = {name: p.detach().clone() for name, p in coder.named_parameters()}
    old = {name: tensor.clone() for name, tensor in state.optimiser.tensors().items()}
    found = resample_(state, x, seed=0)
    assert found.tolist() == [11, 3, 40]  # the longest dead first
    rest = torch.ones(64, dtype=torch.bool)
    rest[found] = False
    for name, parameter in coder.named_parameters():
        if name == "b_dec":
            assert torch.equal(parameter, before[name])
            continue
        assert torch.equal(parameter[rest], before[name][rest])
        is_zero_before = not before[name].any() and not parameter.any()
        assert is_zero_before or not torch.equal(parameter[found], before[name][found])
    directions = torch.nn.functional.normalize(x - coder.b_dec, dim=1)
    cosines = coder.W_dec[found] @ directions.T
    chosen = cosines.argmax(1)
    torch.testing.assert_close(cosines.amax(1), torch.ones(3))
    assert len(set(chosen.tolist())) == 3
    if not coder.is_tied:
        alive = before["W_enc"][rest].norm(dim=1).mean()
        share = 1.0 if coder.cfg.activation == "topk" else 0.2
        expected = share * alive * directions[chosen]
        torch.testing.assert_close(coder.W_enc[found], expected)
        assert not coder.b_enc[found].any()
    if coder.cfg.activation == "jumprelu":
        expected = 0.2 * before["threshold"][rest].mean()
        torch.testing.assert_close(coder.threshold[found], expected.expand(3))
    check_optimiser(state, found, rest, old)
    assert state.dead.last_fired_at[found].tolist() == [state.tokens_seen] * 3
    assert state.dead.indices.numel() == 0
    if state.ema:
        assert torch.equal(state.ema.tensors["W_enc"][found], coder.W_enc[found])
    assert resample_(state, x, seed=0).numel() == 0  # none is dead now


def check_optimiser(state: TrainState, found: Tensor, rest: Tensor, old: dict[str, Tensor]) -> None:
    """Only the rows of these latents are forgotten."""
    for name, tensor in state.optimiser.tensors().items():
        parameter, _, part = name.partition(".")
        if parameter in ("b_dec", "weight_sum"):
            assert torch.equal(tensor, old[name])
            continue
        assert torch.equal(tensor[rest], old[name][rest])
        if part in ("x", "z"):
            assert torch.equal(tensor[found], state.coder.get_parameter(parameter)[found])
        else:
            assert bool((tensor[found] == ("scale" in part)).all()), name


def test_inputs_are_drawn_by_their_squared_loss_and_by_seed_and_step(activations: Tensor):
    """Where one input's loss is a thousand times the others', it is always among the drawn."""
    drawn = set()
    for seed in range(4):
        state, x = some_dead(activations, "fused")
        x = x.clone()
        x[17] = 30 * torch.randn(16, generator=torch.Generator().manual_seed(5))
        found = resample_(state, x, seed)
        directions = torch.nn.functional.normalize(x - state.coder.b_dec, dim=1)
        chosen = (state.coder.W_dec[found] @ directions.T).argmax(1).tolist()
        assert 17 in chosen
        drawn.add(tuple(chosen))
    assert len(drawn) > 1
    again, x = some_dead(activations, "fused")
    other, _ = some_dead(activations, "fused")
    resample_(again, x, 3)
    resample_(other, x, 3)
    assert torch.equal(again.coder.W_dec, other.coder.W_dec)


def test_resampling_is_due_now_and_then_until_its_end():
    cfg = resolved(
        {"train.resample_every_tokens": 30 * BATCH, "train.resample_until_fraction": 0.25}
    )
    assert [step for step in range(400) if is_due(step, cfg)] == [30, 60, 90]
    assert not any(is_due(step, resolved({})) for step in range(400))


@pytest.mark.parametrize(("by", "settings"), KINDS)
def test_reordered_latents_train_the_same_function(
    activations: Tensor, by: str, settings: dict[str, Any]
):
    """Codes are permuted, reconstructions are not, now and five steps on."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    runs = []
    for is_reordered in (False, True):
        state, step = make(activations, by, **settings)
        for number in range(10):
            if number == 5:
                state.dead.refresh(state.tokens_seen)
                if is_reordered:
                    reorder_latents_(state, order)
                    step.weights_changed()
            step(inputs_of(state, 1, BATCH), 1e-3)
            state.step += 1
            if state.ema:
                state.ema.update_(state.coder, state.step)
        runs.append(state)
    plain, other = runs
    # 8-bit moments round by their row's number.
    tolerance = 1e-2 if settings.get("train.adam_moments") else 1e-4
    close = {"rtol": tolerance, "atol": tolerance}
    x = inputs_of(plain, 1, 32)[0]
    with torch.no_grad():
        torch.testing.assert_close(other.coder(x), plain.coder(x), **close)
        torch.testing.assert_close(other.coder.encode(x), plain.coder.encode(x)[:, order], **close)
        one, two = plain.raw_coder(), other.raw_coder()
        torch.testing.assert_close(two.W_enc, one.W_enc[order], **close)
    assert torch.equal(other.dead.last_fired_at, plain.dead.last_fired_at[order])
    assert plain.dead.indices.tolist() == sorted(order[other.dead.indices].tolist())


def test_the_shadow_follows_weights_that_changed(activations: Tensor):
    state, step = make(activations, "fused", **{"train.mixed_precision": "bf16"})
    assert isinstance(step, FusedStep)
    shadow = step.coder.enc_shadow
    assert shadow is not None
    state.coder.W_enc.data.mul_(2)
    step.weights_changed()
    torch.testing.assert_close(shadow.float(), state.coder.W_enc.detach(), rtol=1e-2, atol=1e-3)
    assert step.coder.enc_shadow is shadow
