"""Each optimiser against its formula in float64, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_states import BATCH, inputs_of, make, resolved, train
from torch import Tensor

from sae.coder import SparseCoder
from sae.config import CoderConfig, TrainConfig
from sae.train.muon import orthogonalised
from sae.train.optimisers import OPTIMISERS, Optimiser

RATES = [1e-3, 3e-3, 2e-3]


def small(settings: dict[str, Any]) -> tuple[SparseCoder, Optimiser]:
    coder = SparseCoder.create(5, CoderConfig(d_sae=12, k=2))
    train = TrainConfig(tokens=8192, **settings)
    return coder, OPTIMISERS[train.optimizer](coder, train)


def gradients(n: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (12, 5), "W_dec": (12, 5), "b_enc": (12,), "b_dec": (5,)}
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(n)
    ]


def descend(
    coder: SparseCoder,
    optimiser: Optimiser,
    found: list[dict[str, Tensor]],
    *,
    as_tensors: bool = False,
) -> None:
    for number, (rate, step) in enumerate(zip(RATES, found, strict=True), 1):
        for name, gradient in step.items():
            coder.get_parameter(name).grad = gradient.clone()
        if as_tensors:
            lr = torch.tensor(rate, dtype=torch.float64)
            optimiser.step_(coder, lr, torch.tensor(number))
        else:
            optimiser.step_(coder, rate, number)


@pytest.mark.parametrize(
    "settings",
    [{}, {"adam_moments": "8bit"}, {"optimizer": "muon"}, {"optimizer": "signum"}],
    ids=["adam", "8-bit adam", "muon", "signum"],
)
def test_rate_and_number_may_be_tensors(settings: dict[str, Any]):
    """So that a captured step reads them where they are; torch reads a tensor in float32."""
    (plain, by_numbers), (read, by_tensors) = small(settings), small(settings)
    found = gradients(3)
    descend(plain, by_numbers, found)
    descend(read, by_tensors, found, as_tensors=True)
    for name, w in weights(plain).items():
        torch.testing.assert_close(weights(read)[name], w, rtol=1e-6, atol=1e-9)


def weights(coder: SparseCoder) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in coder.named_parameters()}


def adam_reference(w: Tensor, grads: list[Tensor]) -> Tensor:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, (rate, g) in enumerate(zip(RATES, grads, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return w


def test_adam_is_its_formula():
    coder, optimiser = small({})
    before, found = weights(coder), gradients(3)
    descend(coder, optimiser, found)
    for name, w in before.items():
        expected = adam_reference(w, [g[name].double() for g in found])
        torch.testing.assert_close(weights(coder)[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_adam_with_narrow_moments_is_near_its_formula(moments: str):
    coder, optimiser = small({"adam_moments": moments})
    before, found = weights(coder), gradients(3)
    descend(coder, optimiser, found)
    tensors = optimiser.tensors()
    assert tensors["W_enc.exp_avg"].element_size() < 4
    assert tensors["b_enc.exp_avg"].dtype == torch.float32
    for name, w in before.items():
        expected = adam_reference(w, [g[name].double() for g in found]) - w
        error = (weights(coder)[name] - w - expected).norm() / expected.norm()
        assert error < (0.05 if name in ("W_enc", "W_dec") else 1e-3), name


def test_muon_is_its_formula():
    coder, optimiser = small({"optimizer": "muon"})
    before, found = weights(coder), gradients(3)
    descend(coder, optimiser, found)
    for name in ("W_enc", "W_dec"):
        w, momentum = before[name], torch.zeros(12, 5, dtype=torch.float64)
        for rate, step in zip(RATES, found, strict=True):
            momentum = 0.95 * momentum + 0.05 * step[name].double()
            update = 0.05 * step[name].double() + 0.95 * momentum
            left, values, right = torch.linalg.svd(update, full_matrices=False)
            values = values / values.norm()
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            w = w - rate * 0.2 * 12**0.5 * (left * values) @ right
        torch.testing.assert_close(weights(coder)[name], w, rtol=1e-4, atol=1e-6)
    for name in ("b_enc", "b_dec"):
        expected = adam_reference(before[name], [g[name].double() for g in found])
        torch.testing.assert_close(weights(coder)[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(200, 16), (16, 200), (32, 32)])
def test_an_orthogonalised_matrix_is_nearly_orthogonal(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linspace(0.05, 1, len(values)) * 1e-4  # whatever its size
    found = orthogonalised((left * values) @ right)
    singular = torch.linalg.svdvals(found)
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3
    assert float((found * (left @ right)).sum() / found.norm() / (left @ right).norm()) > 0.97


def test_rows_without_a_gradient_stay():
    matrix = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    matrix[7] = 0
    assert orthogonalised(matrix)[7].abs().max() == 0
    assert orthogonalised(torch.zeros(4, 3)).abs().max() == 0


def test_signum_is_its_formula():
    coder, optimiser = small({"optimizer": "signum"})
    before, found = weights(coder), gradients(3)
    descend(coder, optimiser, found)

    def unit(rows: Tensor, name: str) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True) if name == "W_dec" else rows

    for name, w in before.items():
        y, z, x, total = w, w, w, 0.0
        for rate, step in zip(RATES, found, strict=True):
            total += rate**2
            z = unit(z - rate * step[name].double().sign(), name)
            x = unit((1 - rate**2 / total) * x + rate**2 / total * z, name)
            y = 0.05 * z + 0.95 * x
        torch.testing.assert_close(weights(coder)[name], y, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(optimiser.averages()[name].double(), x, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{"optimizer": "muon"}, {"optimizer": "signum"}])
def test_every_optimiser_learns(activations: Tensor, settings: dict[str, str]):
    flat = {f"train.{name}": value for name, value in settings.items()}
    _, rows = train(activations, "autograd", 60, **flat, **{"train.grad_clip_norm": 1.0})
    assert rows[-1]["reconstruction"] < 0.7 * rows[0]["reconstruction"]


@pytest.mark.parametrize("change", [{"train.optimizer": "signum"}, {"train.ema_decay": 0.9}])
def test_the_average_is_what_is_kept(activations: Tensor, change: dict[str, Any]):
    state, _ = train(activations, "autograd", 5, **change)
    if state.ema:
        state.ema.update_(state.coder, 5)
    kept, averages = state.raw_coder(), state.averages()
    scale = state.calibration.normaliser.factor
    assert scale is not None
    torch.testing.assert_close(kept.W_enc.detach(), averages["W_enc"])
    torch.testing.assert_close(kept.b_enc.detach(), averages["b_enc"] / scale)
    assert not torch.allclose(kept.W_enc, state.coder.W_enc)
    torch.testing.assert_close(kept.W_dec.norm(dim=1), torch.ones(64))
    cosine = torch.nn.functional.cosine_similarity(kept.W_dec, averages["W_dec"])
    torch.testing.assert_close(cosine.detach(), torch.ones(64))


def test_the_moving_average_is_its_formula(activations: Tensor):
    state, step = make(activations, "fused", **{"train.ema_decay": 0.3})
    assert state.ema is not None
    expected = state.coder.W_enc.detach().double().clone()
    for number in (1, 2, 3, 4):
        step(inputs_of(state, 1, BATCH), 1e-2)
        state.ema.update_(state.coder, number)
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * state.coder.W_enc.detach().double()
    torch.testing.assert_close(state.ema.tensors["W_enc"].double(), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.ema_decay": 0.9, "train.optimizer": "signum"}, "ema_decay.*average already"),
        ({"train.ema_decay": 1.0}, r"`train.ema_decay` must be in \[0, 1\)"),
        ({"train.k_start": 65}, r"`train.k_start` must be in \[1, `coder.d_sae`\]; got k_start=65"),
        ({"train.k_start": 0}, "`train.k_start` must be positive"),
        ({"train.k_start": 9, "coder.activation": "relu"}, "`train.k_start` is a setting of topk"),
        ({"train.sparsity_warmup_fraction": 0.1}, "sparsity_warmup_fraction` is a setting of relu"),
        ({"train.p_end": 0.5, "coder.activation": "relu"}, "p_end` needs `coder.sparsity_loss: p"),
        ({"train.k_anneal_fraction": 1.5}, r"`train.k_anneal_fraction` must be in \[0, 1\]"),
        ({"coder.dead_penalty": 0.1}, "`coder.dead_penalty` is a setting of relu"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        resolved(settings)


def test_other_optimisers_take_the_autograd_step_with_a_warning():
    with pytest.warns(UserWarning, match=r"does not train `train.optimizer: muon`; falling back"):
        assert resolved({"train.optimizer": "muon"}).train.step == "autograd"
