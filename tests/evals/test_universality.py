"""Agreement of dictionaries: known answers, nulls, and brute force over all matchings."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from toy_worlds import gaussian, unit

from sae.coder.latents import from_dense
from sae.evals.interface import Undefined
from sae.evals.universality import agreement, code_agreement, pairwise_agreement


def dictionary(rows: Tensor, encoder: Tensor | None = None) -> SimpleNamespace:
    return SimpleNamespace(W_dec=rows, W_enc=rows if encoder is None else encoder)


def sparse_code(n: int, m: int, seed: int) -> Tensor:
    values = gaussian(n, m, seed=seed)
    return torch.where(values > 0.8, values, 0.0)


def test_the_same_latents_in_another_order_and_sign_agree_entirely():
    rows = gaussian(20, 12, seed=0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    found = agreement(dictionary(rows), dictionary(-3 * rows[order]))
    for name in ("mcc", "mmcs_a", "mmcs_b", "shared_0.7", "mcc_normalised"):
        assert found[name] == pytest.approx(1), name
    assert found["mcc_null"] < 0.8


def test_unrelated_dictionaries_are_at_the_null():
    found = agreement(dictionary(gaussian(60, 40, seed=0)), dictionary(gaussian(60, 40, seed=1)))
    assert abs(found["mcc_normalised"]) < 0.05
    assert found["shared_0.7"] == 0


def test_equals_the_best_of_all_matchings():
    a, b = unit(gaussian(4, 5, seed=0)).double(), unit(gaussian(6, 5, seed=1)).double()
    cosines = (a @ b.T).abs()
    best = max(
        sum(float(cosines[i, j]) for i, j in enumerate(chosen)) / 4
        for chosen in permutations(range(6), 4)
    )
    found = agreement(dictionary(a), dictionary(b))
    swapped = agreement(dictionary(b), dictionary(a))
    assert found["mcc"] == pytest.approx(best) == swapped["mcc"]
    assert found["mmcs_a"] == pytest.approx(float(cosines.amax(1).mean())) == swapped["mmcs_b"]
    assert found["mmcs_b"] == pytest.approx(float(cosines.amax(0).mean())) == swapped["mmcs_a"]


def test_a_wider_dictionary_holds_a_narrower_one():
    wide = gaussian(30, 16, seed=2)
    found = agreement(dictionary(wide[:10]), dictionary(wide))
    assert found["mcc"] == found["mmcs_a"] == found["shared_0.7"] == pytest.approx(1)
    assert found["mmcs_b"] < 0.9


def test_shared_needs_the_encoder_too():
    rows, other = gaussian(20, 12, seed=0), gaussian(20, 12, seed=5)
    half = torch.cat([rows[:10], other[10:]])
    assert agreement(dictionary(rows), dictionary(rows, half))["shared_0.7"] == 0.5
    bare = SimpleNamespace(W_dec=rows)
    assert isinstance(agreement(bare, bare)["shared_0.7"], Undefined)


def test_several_seeds_are_compared_in_pairs():
    rows = gaussian(20, 12, seed=0)
    three = [dictionary(rows), dictionary(rows.flip(0)), dictionary(gaussian(20, 12, seed=9))]
    found = pairwise_agreement(three)
    assert found["mcc_largest"] == pytest.approx(1)
    away = agreement(three[0], three[2])["mcc"]
    assert found["mcc_smallest"] == pytest.approx(away)
    assert found["mcc"] == pytest.approx((1 + 2 * away) / 3)
    with pytest.raises(ValueError, match="at least two"):
        pairwise_agreement(three[:1])


def test_codes_agree_across_models_and_shuffled_tokens_do_not():
    a, b = sparse_code(4000, 8, seed=0), sparse_code(4000, 8, seed=1)
    mixed = torch.cat([a[:, [3, 1, 0]] * 2, b[:, :3]], 1)
    found = code_agreement(from_dense(a), from_dense(mixed), 8, 6)
    expected = torch.corrcoef(torch.cat([a, mixed], 1).T.double())[:8, 8:].abs()
    assert found["mmcs_b"] == pytest.approx(float(expected.amax(0).mean()), rel=1e-9)
    assert found["mcc"] == pytest.approx(0.5, abs=0.05)
    assert found["mcc_null"] < 0.05
    shuffled = code_agreement(from_dense(a), from_dense(mixed.roll(7, 0)), 8, 6)
    assert abs(shuffled["mcc_normalised"]) < 0.02


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="one width; got 12 and 9"):
        agreement(dictionary(gaussian(5, 12, seed=0)), dictionary(gaussian(5, 9, seed=0)))
    codes = from_dense(sparse_code(40, 8, seed=0))
    with pytest.raises(ValueError, match="same tokens; got 40 and 39"):
        code_agreement(codes, from_dense(sparse_code(39, 8, seed=0)), 8, 8)
