"""Thresholds are set so that a given number of latents fires on given activations."""

from __future__ import annotations

import pytest
import torch
from coder_variants import VARIANTS, make_variant
from torch import Tensor

from sae.coder import SparseCoder
from sae.coder.set_thresholds import asked_l0, set_thresholds_
from sae.config import CoderConfig

X = torch.randn(3000, 12, generator=torch.Generator().manual_seed(3))
REFINED_JUMPRELU = "a refined jumprelu"


def make(name: str) -> SparseCoder:
    if name != REFINED_JUMPRELU:
        return make_variant(name, d_in=12, d_sae=40, k=4)
    cfg = CoderConfig(d_sae=40, activation="jumprelu", target_l0=4.0, refine_step=0.3)
    coder = SparseCoder.create(12, cfg, seed=1)
    with torch.no_grad():
        coder.threshold.copy_(
            0.2 + 0.3 * torch.rand(40, generator=torch.Generator().manual_seed(2))
        )
    return coder


@torch.no_grad()
def l0(coder: SparseCoder, x: Tensor = X) -> float:
    return float((coder.encode(x) != 0).double().sum(1).mean())


@pytest.mark.parametrize(
    "name", ["batchtopk", "matryoshka", "refined", "jumprelu_quadratic", REFINED_JUMPRELU]
)
def test_the_l0_is_what_was_asked_for(name: str):
    coder = make(name)
    before, old = coder.threshold.clone(), l0(coder)
    set_thresholds_(coder, X)
    asked = asked_l0(coder)
    assert abs(old - asked) > 0.3
    # One factor for all latents: a pair more or less is what rounding may cost.
    tolerance = 0.02 if name == REFINED_JUMPRELU else 2 / len(X)
    assert l0(coder) == pytest.approx(asked, abs=tolerance)
    ratios = coder.threshold / before
    torch.testing.assert_close(ratios, ratios[0].expand(40))


def test_both_selections_of_a_refined_code_keep_k():
    coder = make("refined")
    set_thresholds_(coder, X)
    h = (X - coder.b_dec) @ coder.W_enc.T + coder.b_enc
    first = (h > coder.first_threshold).double().sum(1).mean()
    assert float(first) == pytest.approx(4, abs=2 / len(X))


@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if VARIANTS[name]["activation"] in ("topk", "relu", "gated")]
)
def test_a_coder_without_such_thresholds_stays(name: str):
    coder = make(name)
    before = {key: tensor.clone() for key, tensor in coder.state_dict().items()}
    set_thresholds_(coder, X)
    for key, tensor in coder.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_a_jumprelu_without_a_target_stays():
    coder = make("jumprelu")
    before = coder.threshold.clone()
    set_thresholds_(coder, X)
    assert torch.equal(coder.threshold, before)


def test_thresholds_that_nothing_can_set_stay():
    """No factor lets more latents through than there are positive pre-activations."""
    coder = make("batchtopk")
    with torch.no_grad():
        coder.b_enc.fill_(-100)
    before = coder.threshold.clone()
    set_thresholds_(coder, X)
    assert torch.equal(coder.threshold, before)
