"""The pre-activation loss lifts dead latents, and them alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae.coder import SparseCoder
from sae.coder.dead_penalty import pre_act_loss
from sae.coder.losses import LossInputs, extra_loss_names
from sae.coder.step_values import StepValues
from sae.config import CoderConfig


def inputs(activation: str, dead: list[int]) -> LossInputs:
    cfg = CoderConfig(d_sae=9, activation=activation, dead_penalty=0.5)  # pyright: ignore[reportArgumentType]
    coder = SparseCoder.create(4, cfg)
    with torch.no_grad():
        coder.W_dec.mul_(torch.linspace(1, 2, 9)[:, None])
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    encoding = coder.encode_for_losses(x)
    given = coder, x, x, x, encoding.code, torch.tensor(dead, dtype=torch.int64)
    return LossInputs(*given, StepValues.fixed(coder.cfg), encoding.pre_acts)


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_it_is_its_definition_and_moves_dead_latents_alone(activation: str):
    given, dead = inputs(activation, [2, 7]), [2, 7]
    coder = given.coder
    assert "dead_penalty" in extra_loss_names(coder.cfg)
    loss = pre_act_loss(given)
    theta: Tensor = coder.threshold if activation == "jumprelu" else torch.zeros(9)
    expected, W_enc, W_dec = 0.0, coder.W_enc.detach().double(), coder.W_dec.detach().double()
    for row in given.x.double():
        for j in dead:
            h = row @ W_enc[j]  # biases are 0
            expected += float((theta[j].detach() - h).clamp_min(0) * W_dec[j].norm())
    assert float(loss.detach()) == pytest.approx(0.5 * expected / 6, rel=1e-5)
    loss.backward()
    assert coder.W_enc.grad is not None
    assert coder.W_enc.grad.any(1).nonzero().flatten().tolist() == dead
    assert coder.b_enc.grad is not None
    assert bool((coder.b_enc.grad[dead] < 0).all())  # descent raises them
    assert coder.W_dec.grad is None


def test_without_dead_latents_it_is_zero():
    assert float(pre_act_loss(inputs("relu", []))) == 0
