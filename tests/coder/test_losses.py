"""Each loss against its formula, in float64, and the weight that steers L0."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from coder_variants import VARIANTS, make_variant
from torch import Tensor

from sae.coder import SparseCoder, to_raw_units
from sae.coder.latents import to_dense
from sae.coder.losses import LossInputs, extra_losses
from sae.coder.reconstruction import reconstruct, token_mean
from sae.coder.sparsity import PRESSURE_GAIN, PRESSURE_RATE, pressure_
from sae.coder.step_values import StepValues

D_IN, D_SAE, K, N = 12, 40, 5, 16


def make(name: str, **settings) -> SparseCoder:
    coder = make_variant(name, d_in=D_IN, d_sae=D_SAE, k=K).double()
    coder.cfg = replace(coder.cfg, **settings)
    if coder.cfg.target_l0 is not None:
        coder.register_buffer("log_pressure", torch.zeros((), dtype=torch.float64))
    return coder


def inputs(n: int = N, seed: int = 3) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)).double()


def losses_of(coder: SparseCoder, x: Tensor, values: StepValues | None = None) -> dict[str, Tensor]:
    values = values or StepValues.fixed(coder.cfg)
    found = coder.encode_for_losses(x, values)
    residual, loss = reconstruct(coder, found.code, x, values, 3.0)
    dead = torch.arange(6)
    given = LossInputs(
        coder, x, x, residual, found.code, dead, values, found.pre_acts, found.wider, 3.0
    )
    return {"reconstruction": loss, **extra_losses(given)}


def test_without_prefixes_it_is_the_mean_squared_error():
    coder, x = make("topk"), inputs()
    errors = (x - coder(x)).pow(2).sum(1)
    torch.testing.assert_close(losses_of(coder, x)["reconstruction"], errors.mean() / 3)
    parts = torch.stack([losses_of(coder, part)["reconstruction"] for part in x.split(4)])
    torch.testing.assert_close(parts.mean(), losses_of(coder, x)["reconstruction"])


@pytest.mark.parametrize("name", ["matryoshka", "matryoshka_gated", "matryoshka_pursuit"])
def test_prefixes_reconstruct_on_their_own(name: str):
    """Sparse, dense and tied codes against the definition, gradients too."""
    coder, x = make(name), inputs()
    found = losses_of(coder, x)["reconstruction"]
    code = to_dense(coder.encode_training(x), D_SAE)
    errors = [
        (x - code[:, :end] @ coder.W_dec[:end] - coder.b_dec).pow(2).sum(1).mean()
        for end in (4, 11, D_SAE)
    ]
    expected = torch.stack(errors).mean() / 3
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, coder.W_dec)
    torch.testing.assert_close(torch.autograd.grad(found, coder.W_dec), wanted)


def test_a_detached_prefix_trains_what_the_one_before_lacks():
    coder, x = make("refined", tilt=0.0), inputs()
    code = to_dense(coder.encode_training(x), D_SAE).detach()
    found = reconstruct(coder, code, x, StepValues.fixed(coder.cfg), 3.0)[1]
    errors = []
    for start, end in ((0, 4), (4, 11)):
        still = code[:, :start] @ coder.W_dec[:start].detach()
        still = still + (coder.b_dec.detach() if start else coder.b_dec)
        errors.append((x - still - code[:, start:end] @ coder.W_dec[start:end]).pow(2).sum(1))
    errors.append((x - code @ coder.W_dec - coder.b_dec).pow(2).sum(1))
    expected = torch.stack(errors).mean() / 3
    torch.testing.assert_close(found, expected)
    for name in ("W_dec", "b_dec"):
        parameter = coder.get_parameter(name)
        wanted = torch.autograd.grad(expected, parameter, retain_graph=True)
        given = torch.autograd.grad(found, parameter, retain_graph=True)
        torch.testing.assert_close(given, wanted)


def test_tilt_weighs_the_worst_tokens_most():
    errors = inputs(200)[:, 0].abs()
    assert token_mean(errors, 0.0) == errors.mean()
    weights = torch.softmax(0.7 * errors / errors.mean(), 0)
    torch.testing.assert_close(token_mean(errors, 0.7), (weights * errors).sum())
    assert token_mean(errors, 0.7) > errors.mean()
    torch.testing.assert_close(token_mean(5 * errors, 0.7), 5 * token_mean(errors, 0.7))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("relu", "l1"),
        ("relu", "p_norm"),
        ("relu", "tanh"),
        ("gated", "l1"),
        ("gated", "tanh"),
        ("jumprelu", "tanh"),
        ("jumprelu", "step"),
        ("jumprelu", "quadratic"),
    ],
)
def test_sparsity_losses_are_their_formulas(name: str, kind: str):
    target = 6.0 if kind == "quadratic" else None
    coder = make(name, sparsity_loss=kind, sparsity_coefficient=0.3, target_l0=target)
    x = inputs()
    found = losses_of(coder, x, StepValues(k=K, sparsity=0.5, p=0.6))["sparsity"]
    h = (x - coder.b_dec) @ coder.W_enc.T + coder.b_enc
    z = h.relu() if name in ("relu", "gated") else h * (h > coder.threshold)
    w = z * coder.W_dec.norm(dim=1)
    l0 = (h > coder.threshold).double().sum(1).mean() if name == "jumprelu" else None
    expected = {
        "l1": lambda: w.sum(1).mean() / D_IN**0.5,
        "p_norm": lambda: ((w + 1e-3) ** 0.6 - 1e-3**0.6).sum(1).mean() / D_IN**0.5,
        "tanh": lambda: torch.tanh(4 * w).sum(1).mean(),
        "step": lambda: l0,
        "quadratic": lambda: (l0 / 6 - 1) ** 2,
    }[kind]()
    torch.testing.assert_close(found, 0.5 * 0.3 * expected, check_dtype=False, rtol=1e-6, atol=0)


def test_the_gates_own_reconstruction_holds_the_decoder_still():
    coder, x = make("gated"), inputs()
    gates = ((x - coder.b_dec) @ coder.W_enc.T + coder.b_enc).relu()
    expected = (x - gates @ coder.W_dec - coder.b_dec).pow(2).sum(1).mean() / 3
    torch.testing.assert_close(losses_of(coder, x)["gate"], expected)


def test_multi_topk_is_the_wider_codes_error():
    coder, x = make("multi_topk"), inputs()
    h = (x - coder.b_dec) @ coder.W_enc.T + coder.b_enc
    least = h.sort(descending=True).values[:, 11:12]
    wide = torch.where(h >= least, h.relu(), 0)
    expected = (x - wide @ coder.W_dec - coder.b_dec).pow(2).sum(1).mean() / 3
    torch.testing.assert_close(losses_of(coder, x)["multi_topk"], 0.125 * expected)


def test_pressure_adds_up_the_error_and_answers_it():
    coder = make("relu_p_norm")
    latents = torch.ones(8, D_SAE)
    latents[:, 4:] = 0  # four of the three that are asked for
    error = math.log(4 / 3)
    for i in range(1, 4):
        expected = torch.tensor(i * PRESSURE_RATE * error + PRESSURE_GAIN * error).exp()
        torch.testing.assert_close(pressure_(coder, latents), expected, check_dtype=False)
    assert pressure_(coder, torch.zeros(8, D_SAE)) < 1
    flooded = pressure_(make("relu_p_norm"), torch.ones(8, D_SAE))  # the error counts as 2 at most
    torch.testing.assert_close(
        flooded, torch.tensor(2 * PRESSURE_RATE + 2 * PRESSURE_GAIN).exp(), check_dtype=False
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_only_a_coder_with_a_target_has_a_pressure(name: str):
    assert hasattr(make(name), "log_pressure") == ("target_l0" in VARIANTS[name])


def test_thresholds_are_steered_to_the_target():
    """They move at once, and by shares: a gradient would take them there by a rate a step."""
    coder, x = make("jumprelu_quadratic"), inputs()
    with torch.no_grad():
        coder.threshold.fill_(0.01)
    for _ in range(300):
        losses_of(coder, x)
    l0 = (coder.encode(x) != 0).double().sum(1).mean()
    assert float(l0) == pytest.approx(3.0, rel=0.05)
    assert (coder.threshold == 0.01).all()
    coder, x = coder.float(), x.float()
    raw = to_raw_units(coder, 2.0)
    assert float(raw.log_pressure) == 0
    torch.testing.assert_close(raw.threshold, coder.thresholds() / 2)
    torch.testing.assert_close(raw.encode(x / 2), coder.encode(x) / 2, rtol=1e-4, atol=1e-5)
