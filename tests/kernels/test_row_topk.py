"""topk: exact by values and by gathering, in every form, with its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import each_dtype
from torch import Tensor

import sae_kernels
from sae_kernels.row_topk import CPU_GROUP_SIZE, MIN_ROW_PER_K, gpu_group_size


def assert_is_topk(x: Tensor, values: Tensor, indices: Tensor, k: int) -> None:
    assert values.shape == indices.shape == (*x.shape[:-1], k)
    assert values.dtype == x.dtype
    assert indices.dtype == torch.int64
    expected = x.topk(k, dim=-1)[0]
    torch.testing.assert_close(
        values.sort(-1, descending=True)[0], expected, rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(x.gather(-1, indices), values, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row.tolist())) == k for row in indices.reshape(-1, k))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "k", "group_size"), [(640, 4, 8), (643, 10, 64), (9, 9, 1)])
@each_dtype
def test_groups_are_exact(
    width: int, k: int, group_size: int, interleaved: bool, dtype, generator
) -> None:
    x = torch.randn(11, width, generator=generator).to(dtype)
    found = sae_kernels.topk_by_groups(x, k, group_size=group_size, interleaved=interleaved)
    assert_is_topk(x, *found, k)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), interleaved=st.booleans(), group_size=st.integers(1, 5))
def test_groups_are_exact_with_ties_nan_and_infinities(data, interleaved, group_size) -> None:
    k = data.draw(st.integers(1, 4))
    width = data.draw(st.integers(k * group_size, 40))
    special = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, math.inf, -math.inf, math.nan])
    x = torch.tensor(data.draw(st.lists(special, min_size=width, max_size=width)))[None]
    found = sae_kernels.topk_by_groups(x, k, group_size=group_size, interleaved=interleaved)
    assert_is_topk(x, *found, k)


@pytest.mark.parametrize("shape", [(300,), (0, 300), (3, 2, 300), (2, 0, 300), (1, 900)])
@pytest.mark.parametrize("k", [1, 4, 200])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_any_leading_shape(shape: tuple[int, ...], k: int, impl, generator) -> None:
    x = torch.randn(shape, generator=generator)
    assert_is_topk(x, *sae_kernels.topk(x, k, impl=impl), k)


def test_non_contiguous_rows(generator) -> None:
    x = torch.randn(300, 7, generator=generator).T
    assert_is_topk(x, *sae_kernels.topk(x, 2), 2)


def test_k_is_the_whole_row(generator) -> None:
    x = torch.randn(3, 12, generator=generator)
    assert_is_topk(x, *sae_kernels.topk(x, 12), 12)


@pytest.mark.parametrize("width", [40, 16 * MIN_ROW_PER_K])
def test_sorted_descends(width: int, generator) -> None:
    x = torch.randn(50, width, generator=generator)
    values, _ = sae_kernels.topk(x, 16, sorted=True)
    assert torch.equal(values, x.topk(16)[0])


@pytest.mark.parametrize("width", [20, 2 * MIN_ROW_PER_K])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_gradcheck(width: int, impl, generator) -> None:
    x = torch.randn(3, width, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sae_kernels.topk(x, 2, impl=impl)[0], (x,))


def test_gpu_groups_balance_maxima_and_candidates() -> None:
    assert gpu_group_size(131_072, 64) == 64
    assert gpu_group_size(24_576, 32) == 32
    for width, k in [(64, 1), (64 * 128, 128), (1_048_576, 64)]:
        assert width // gpu_group_size(width, k) >= k
    assert MIN_ROW_PER_K >= CPU_GROUP_SIZE  # so at least k groups exist


def test_compiles(generator) -> None:
    x = torch.randn(4, 600, generator=generator)
    compiled = torch.compile(sae_kernels.topk, fullgraph=True, backend="aot_eager")
    assert_is_topk(x, *compiled(x, 3), 3)


@pytest.mark.parametrize("k", [0, 21])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"`k` must be in \[1, the row length\]; got k={k}.*=20"):
        sae_kernels.topk(torch.zeros(2, 20), k)


def test_dtype_axis_and_impl_errors() -> None:
    with pytest.raises(TypeError, match=r"`x` must be floating point; got torch\.int64"):
        sae_kernels.topk(torch.zeros(2, 20, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="`x` must have at least one axis; got a scalar"):
        sae_kernels.topk(torch.zeros(()), 1)
    with pytest.raises(ValueError, match=r"`impl` must be one of .*; got 'fast'"):
        sae_kernels.topk(torch.zeros(2, 20), 1, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="`topk` has none yet"):
        sae_kernels.topk(torch.zeros(2, 20), 1, impl="triton")
