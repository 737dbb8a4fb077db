"""Views of an attention-output dictionary by head."""

from __future__ import annotations

import pytest
import torch

from sae.analysis import head_contributions, head_shares
from sae.coder import SparseCoder
from sae.coder.pre_acts import pre_activations
from sae.config import CoderConfig


@pytest.fixture
def coder() -> SparseCoder:
    coder = SparseCoder.create(12, CoderConfig(d_sae=10, k=3), seed=0)
    with torch.no_grad():
        coder.b_dec.normal_(generator=torch.Generator().manual_seed(1))
        coder.W_dec[4, :8] = 0  # latent 4 is the last head's
    return coder


def test_shares_say_whose_work_a_latent_is(coder: SparseCoder):
    shares = head_shares(coder, 3)
    assert shares.shape == (3, 10)
    torch.testing.assert_close(shares.sum(0), torch.ones(10))
    assert shares[:, 4].tolist() == [0, 0, 1]
    assert (shares[:, 3] > 0.05).all()


def test_contributions_add_up_to_pre_activations(coder: SparseCoder):
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    found = head_contributions(coder, x, [1, 4, 9], 3)
    assert found.shape == (7, 3, 3)
    expected = (pre_activations(coder, x) - coder.b_enc)[:, [1, 4, 9]]
    torch.testing.assert_close(found.sum(1), expected.detach())
    moved = x.clone()
    moved[:, 4:8] += 1  # the second head alone
    changed = (head_contributions(coder, moved, [1], 3) - found[:, :, :1]).abs().amax((0, 2))
    assert changed[[0, 2]].max() == 0 < changed[1]


def test_what_has_no_heads_is_refused(coder: SparseCoder):
    with pytest.raises(ValueError, match="multiple of `n_heads`"):
        head_shares(coder, 5)
    with pytest.raises(ValueError, match="`latents` must be in"):
        head_contributions(coder, torch.zeros(1, 12), [10], 3)
