"""Each activation function against its definition, in float64 and the plainest words."""

from __future__ import annotations

import pytest
import torch
from coder_variants import make_variant
from torch import Tensor

from sae.coder import SparseCoder
from sae.coder.latents import to_dense
from sae.coder.step_values import StepValues

D_IN, D_SAE, K, N = 12, 40, 5, 16


def make(name: str) -> SparseCoder:
    return make_variant(name, d_in=D_IN, d_sae=D_SAE, k=K).double()


def inputs(n: int = N, seed: int = 3) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)).double()


def pre_acts_of(coder: SparseCoder, x: Tensor) -> Tensor:
    return (x - coder.b_dec) @ coder.W_enc.T + coder.b_enc


def largest(h: Tensor, k: int) -> Tensor:
    """Which of all elements of h are among its k largest."""
    return h >= h.flatten().sort(descending=True).values[k - 1]


def by_definition(name: str, coder: SparseCoder, h: Tensor, theta: Tensor | None) -> Tensor:
    if name.endswith("jumprelu") or name in ("batchtopk", "refined"):
        return torch.where(h > theta, h.relu(), 0)
    if name == "relu":
        return h.relu()
    if name == "gated":
        magnitudes = (coder.r_mag.exp() * (h - coder.b_enc) + coder.b_mag).relu()
        return torch.where(h > 0, magnitudes, 0)
    sizes = h.abs() if name == "signed" else h
    kept = torch.stack([largest(row, K) for row in sizes])
    return torch.where(kept, h if name == "signed" else h.relu(), 0)


@pytest.mark.parametrize("name", ["topk", "signed", "batchtopk", "jumprelu", "relu", "gated"])
@torch.no_grad()
def test_a_code_is_its_definition(name: str):
    coder, x = make(name), inputs()
    expected = by_definition(name, coder, pre_acts_of(coder, x), getattr(coder, "threshold", None))
    torch.testing.assert_close(coder.encode(x), expected)
    torch.testing.assert_close(coder(x), expected @ coder.W_dec + coder.b_dec)
    assert 0 < (expected != 0).double().mean() < 1
    if name == "signed":
        assert (expected < 0).any()


@pytest.mark.parametrize("name", ["refined", "refined_topk"])
@torch.no_grad()
def test_a_refined_code_is_its_definition(name: str):
    coder, x = make(name), inputs()
    plain = name.removeprefix("refined_")
    h = pre_acts_of(coder, x)
    first = by_definition(plain, coder, h, getattr(coder, "first_threshold", None))
    left = x - first @ coder.W_dec - coder.b_dec
    h = h + coder.cfg.refine_step * left @ coder.W_enc.T
    code = by_definition(plain, coder, h, getattr(coder, "threshold", None))
    torch.testing.assert_close(coder.encode(x), code)
    assert not torch.equal(code != 0, first != 0)


@torch.no_grad()
def test_batchtopk_selects_over_the_batch_and_follows_the_least():
    coder, x = make("batchtopk"), inputs()
    threshold = coder.threshold.clone()
    h = pre_acts_of(coder, x)
    kept = largest(h, K * N)
    code = to_dense(coder.encode_training(x), D_SAE)
    torch.testing.assert_close(code, torch.where(kept, h.relu(), 0))
    assert len(set((code != 0).sum(1).tolist())) > 1  # tokens share what the batch has
    rate = coder.cfg.threshold_rate
    torch.testing.assert_close(coder.threshold, threshold + rate * (h[kept].min() - threshold))
    followed = coder.threshold.clone()
    coder.encode(x), coder.encode_sparse(x), coder(x)
    assert torch.equal(coder.threshold, followed)  # use is not training


@torch.no_grad()
def test_a_running_threshold_begins_at_the_first_batchs():
    coder, x = make("batchtopk"), inputs()
    coder.threshold.zero_()
    coder.encode_training(x)
    least = pre_acts_of(coder, x).flatten().sort(descending=True).values[K * N - 1]
    torch.testing.assert_close(coder.threshold, least.expand(D_SAE))


@torch.no_grad()
def test_a_refined_batchtopk_follows_both_selections():
    coder = make("refined")
    before = coder.first_threshold.clone(), coder.threshold.clone()
    coder.encode_training(inputs())
    assert not torch.equal(coder.first_threshold, before[0])
    assert not torch.equal(coder.threshold, before[1])


@torch.no_grad()
def test_batchtopk_ends_where_it_was_selected():
    """A threshold that has followed long enough lets through as many as were selected."""
    coder = make("batchtopk")
    for seed in range(600):
        coder.encode_training(inputs(256, seed))
    l0 = float((coder.encode(inputs(20_000, 601)) != 0).double().sum(1).mean())
    assert l0 == pytest.approx(K, rel=0.02)


@torch.no_grad()
def test_matching_pursuit_takes_the_projections_one_by_one():
    coder, x = make("matching_pursuit"), inputs()
    expected = torch.zeros(N, D_SAE).double()
    for i, left in enumerate(x - coder.b_dec):
        for _ in range(K):
            products = coder.W_dec @ left
            j = int(products.argmax())
            expected[i, j] += products[j].clamp_min(0)
            left = left - products[j].clamp_min(0) * coder.W_dec[j]
    torch.testing.assert_close(coder.encode(x), expected)
    assert coder.W_enc is coder.W_dec


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matching_pursuit"])
@torch.no_grad()
def test_a_schedule_sets_k(name: str):
    coder, x = make(name), inputs(64)
    code = to_dense(coder.encode_training(x, StepValues(k=2)), D_SAE)
    assert int((code != 0).sum()) <= 2 * 64
    assert int((to_dense(coder.encode_training(x), D_SAE) != 0).sum()) > 2 * 64


@torch.no_grad()
def test_the_wider_code_of_multi_topk_holds_the_narrow_one():
    coder, x = make("multi_topk"), inputs()
    encoding = coder.encode_for_losses(x)
    assert encoding.wider is not None
    wide, narrow = encoding.wider.to_dense(D_SAE), to_dense(encoding.code, D_SAE)
    assert int((wide != 0).sum(1).max()) == 12
    torch.testing.assert_close(narrow, torch.where(narrow != 0, wide, 0))
    torch.testing.assert_close(narrow, coder.encode(x))
    assert float(narrow[narrow != 0].min()) >= 0


@pytest.mark.parametrize("reaches_x", [False, True])
def test_straight_through_derivatives_are_the_formula(reaches_x: bool):
    from sae.coder.straight_through import jumprelu, step

    h, theta = inputs().requires_grad_(), (0.3 * torch.ones(D_IN).double()).requires_grad_()
    upstream, width = inputs(seed=9), 0.4
    window = ((h - theta).abs() < width / 2).double() / width
    for function, jump, own in ((jumprelu, theta * window, (h > theta)), (step, window, 0 * h)):
        grad_h, grad_theta = torch.autograd.grad(
            function(h, theta, width, reaches_x=reaches_x), (h, theta), upstream, allow_unused=True
        )
        expected = upstream * own + (upstream * jump if reaches_x else 0)
        torch.testing.assert_close(0 * h if grad_h is None else grad_h, expected)
        torch.testing.assert_close(grad_theta, -(upstream * jump).sum(0))
