"""by_latent: a stable grouping of the pairs, and sums over its segments."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, needs_triton

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


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 4), (3, 9), (5, 5), (9, 11), (0, 0)])
def test_some_latents_are_as_if_there_were_no_others(start, stop, ragged, generator) -> None:
    indices, offsets = torch.randint(0, 10, (40,), generator=generator), None
    if ragged:
        offsets = torch.tensor([0, 5, 5, 20, 37])  # and 3 pairs of padding
    else:
        indices = indices.view(8, 5)
    weights, rows = torch.randn(40, generator=generator), torch.randn(8, 3, generator=generator)
    whole = segments.by_latent(indices, 11, offsets)
    part, pairs = segments.of_latents(whole, start, stop)
    assert part.offsets.numel() == stop - start + 1
    assert part.offsets[0] == 0
    assert part.order.numel() == part.tokens.numel() == part.latents.numel() == part.offsets[-1]
    assert bool(((part.latents >= start) & (part.latents < stop)).all())
    assert part.may_pad is False
    ordered = weights[whole.order][pairs]
    sums = segments.weighted_row_sums(whole, weights, rows)
    assert torch.equal(segments.sorted_row_sums(part, ordered, rows), sums[start:stop])
    sums = segments.weighted_sums(whole, weights)
    assert torch.equal(segments.sorted_sums(part, ordered), sums[start:stop])
    assert torch.equal(whole.order[pairs], part.order)


def test_all_latents_need_no_look_at_the_data(generator) -> None:
    found = segments.by_latent(torch.randint(0, 9, (40, 3), generator=generator), 11)
    part, pairs = segments.of_latents(found, 0, 11)
    assert part is found
    assert pairs == slice(None)


@needs_triton
@pytest.mark.parametrize("tile", [1, 4, 128])
def test_a_hub_is_summed_in_tiles(tile: int, generator, monkeypatch) -> None:
    """The tiles' sums are used: rubbish in them shows up in the hub, and nowhere else."""
    monkeypatch.setattr(segments, "TILE", tile)
    indices = torch.randint(0, 12, (15, 1), generator=generator)
    indices = torch.cat([indices, torch.full((15, 1), 5)], 1)
    weights, rows = torch.randn(15, 2, generator=generator), torch.randn(15, 3, generator=generator)
    found = segments.by_latent(indices.to(DEVICE), 12)
    given = weights.to(DEVICE), rows.to(DEVICE)
    sums, weight_sums = segments.launch_segment_sums(found, *given, torch.float32)
    dense = torch.zeros(15, 12).index_put_(
        (torch.arange(15)[:, None], indices), weights, accumulate=True
    )
    torch.testing.assert_close(sums.cpu(), dense.T @ rows)
    torch.testing.assert_close(weight_sums.cpu(), dense.sum(0))

    def skip_tiles(kernel, *args, **options) -> None:
        if kernel is not segments._tile_sums_kernel:
            launch(kernel, *args, **options)

    launch = segments.launch
    monkeypatch.setattr(segments, "launch", skip_tiles)
    without, _ = segments.launch_segment_sums(found, *given, torch.float32)
    spoilt = without.isnan().any(1).cpu()  # tiles that nobody wrote hold NaN
    counts = torch.bincount(indices.flatten(), minlength=12)
    assert bool(spoilt[5]) == (tile <= 4)
    assert not spoilt[counts < tile].any()


def test_ragged_padding_is_in_no_segment() -> None:
    found = segments.by_latent(torch.tensor([1, 0, 1, 0, 0]), 2, torch.tensor([0, 2, 3]))
    assert found.offsets.tolist() == [0, 1, 3]
    assert found.order[:3].tolist() == [1, 0, 2]
    assert found.tokens[:3].tolist() == [0, 0, 1]


@pytest.mark.parametrize("d", [1, 33, 128, 576, 768, 2048, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_widths_waste_little(d: int, dtype: torch.dtype) -> None:
    width = segments.block_width(d, dtype)
    assert width & (width - 1) == 0
    assert width * dtype.itemsize <= 16 * 128
    assert -(-d // width) * width < d + 256 // dtype.itemsize
    assert 1 <= segments.warps_for(width, dtype) <= 4
