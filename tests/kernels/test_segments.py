"""by_latent: a stable grouping of the pairs, and sums over its segments."""

from __future__ import annotations

import pytest
import torch

from sae_kernels import segments


@pytest.mark.parametrize("d_sae", [1, 7, 65_536, 65_537, 70_000, 2**33])
def test_radix_order_is_the_stable_order(d_sae: int, generator) -> None:
    keys = torch.randint(0, d_sae, (500,), generator=generator)
    keys[:20] = d_sae - 1
    assert torch.equal(segments._radix_argsort(keys, d_sae), torch.argsort(keys, stable=True))


def test_segments_hold_each_latents_tokens_ascending(generator) -> None:
    indices = torch.randint(0, 9, (40, 3), generator=generator)
    found = segments.by_latent(indices, 11)
    assert found.offsets.tolist()[0] == 0
    assert found.offsets.tolist()[-1] == indices.numel()
    for latent in range(11):
        mine = slice(found.offsets[latent], found.offsets[latent + 1])
        expected = (indices == latent).nonzero()[:, 0]
        assert torch.equal(found.tokens[mine], expected)


def test_sums_over_segments(generator) -> None:
    indices = torch.tensor([[0, 2], [2, 0], [2, 2]])
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    rows = torch.randn(3, 4, generator=generator)
    found = segments.by_latent(indices, 4)
    sums = segments.weighted_row_sums(found, weights, rows)
    torch.testing.assert_close(sums[0], rows[0] + 4 * rows[1])
    torch.testing.assert_close(sums[2], 2 * rows[0] + 3 * rows[1] + 11 * rows[2])
    assert torch.equal(sums[[1, 3]], torch.zeros(2, 4))
    assert segments.weighted_sums(found, weights).tolist() == [5.0, 0.0, 16.0, 0.0]
