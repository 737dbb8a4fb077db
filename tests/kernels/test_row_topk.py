"""topk: exact by values and by gathering, in every form and kernel, with its gradient."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import each_dtype
from torch import Tensor

import sae_kernels
from sae_kernels.launching import (
    HAS_TRITON,
    INTERPRETING,
    next_power_of_2,
    record_launches,
)
from sae_kernels.row_topk import (
    CPU_GROUP_SIZE,
    MAX_KEYS,
    MAX_PIECES,
    MIN_ROW_PER_K,
    Groups,
    _too_few_rows,
    best_groups,
    choose_kernel,
    cut_in_groups,
    gpu_group_size,
    launch_direct,
    launch_groups,
    launch_streaming,
    launch_topk,
    topk_op,
    topk_rows,
)

# A kernel runs under the interpreter where there is no GPU, at about 0.1 s a row: so rows are few.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
each_kernel = pytest.mark.parametrize("kernel", ["direct", "groups", "streaming"])
each_kernel_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)


def assert_is_topk(x: Tensor, values: Tensor, indices: Tensor, k: int) -> None:
    assert values.shape == indices.shape == (*x.shape[:-1], k)
    assert values.dtype == x.dtype
    assert indices.dtype == torch.int64
    expected = x.topk(k, dim=-1)[0]
    torch.testing.assert_close(
        values.sort(-1, descending=True)[0], expected, rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(bits(x.gather(-1, indices)), bits(values))
    assert all(len(set(row.tolist())) == k for row in indices.reshape(-1, k))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def run_kernel(kernel: str, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """One kernel, whatever the shape: blocks and groups are small, so tiny rows have several."""
    if kernel == "direct":
        return launch_direct(x, k)
    if kernel == "streaming":
        return launch_streaming(x, k, block=16)
    n_groups = next_power_of_2(k)
    cuts = [cut_in_groups(x.shape[1], k, n_groups, piece) for piece in (4, 2, 1)]
    groups = next((groups for groups in cuts if groups), None)
    # k of F = next_power_of_2(k) - 1 or less leave no k groups: the launcher never comes here.
    return launch_groups(x, k, groups) if groups else launch_direct(x, k)


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


def hard_rows(width: int, generator: torch.Generator) -> Tensor:
    """Rows with ties across the k-th place, too few positives, NaN of both signs, infinities."""
    rows = torch.randn(7, width, generator=generator)
    rows[1] = torch.randint(-2, 3, (width,), generator=generator) * 0.5
    rows[2] = -1.5
    rows[3, 5::7] = torch.tensor([0xFFC00000 - 2**32], dtype=torch.int32).view(torch.float32)
    rows[3, 3::11] = NAN
    rows[3, ::2] = INF
    rows[4] = -INF
    rows[4, -1] = -3e4
    rows[5] = -rows[5].abs()
    rows[5, ::3] = -0.0
    rows[5, 4] = 0.0
    rows[6] = -INF
    rows[6, 17], rows[6, -1] = NAN, INF
    return rows


@needs_triton
@each_kernel
@each_kernel_dtype
def test_kernels_are_exact(kernel: str, dtype, generator) -> None:
    x = hard_rows(37, generator).to(dtype).to(DEVICE)
    assert_is_topk(x, *run_kernel(kernel, x, 4), 4)


@needs_triton
@each_kernel
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_kernels_are_exact_for_any_row(kernel: str, data) -> None:
    k = data.draw(st.integers(1, 9))
    width = data.draw(st.integers(k, 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    special = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 1e-7, -1e-40, 2e-40, INF, -INF, NAN])
    numbers = special | st.floats(-9, 9, width=16)
    row = data.draw(st.lists(numbers, min_size=width, max_size=width))
    x = torch.tensor([row], dtype=torch.float32).to(dtype).to(DEVICE)
    if INTERPRETING and dtype == torch.bfloat16:
        # The interpreter makes subnormal bfloat16 zero when it converts it; a GPU does not.
        x[x.abs() < torch.finfo(dtype).tiny] = 0
    assert_is_topk(x, *run_kernel(kernel, x, k), k)


@needs_triton
@each_kernel
@pytest.mark.parametrize(
    ("n", "width", "k"), [(0, 20, 3), (1, 1, 1), (2, 16, 16), (2, 33, 1), (1, 33, 33), (1, 40, 32)]
)
def test_kernels_at_the_edges(kernel: str, n: int, width: int, k: int, generator) -> None:
    x = torch.randn(n, width, generator=generator).bfloat16().to(DEVICE)
    assert_is_topk(x, *run_kernel(kernel, x, k), k)


@needs_triton
@each_kernel
def test_kernels_find_the_last_bit(kernel: str) -> None:
    """Neighbouring floats differ in the last bit of their keys, which the search tries last."""
    for dtype, one in [(torch.float32, 0x3F800000), (torch.float16, 0x3C00)]:
        ints = torch.int32 if dtype == torch.float32 else torch.int16
        # A step of 37 over 64 elements visits each once.
        x = ((torch.arange(64) * 37 % 64).to(ints) + one).view(dtype)[None].to(DEVICE)
        x = torch.cat([x, -x])
        assert_is_topk(x, *run_kernel(kernel, x, 5), 5)


@needs_triton
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_strided_rows_are_not_copied(impl, generator) -> None:
    x = torch.randn(3, 80, generator=generator).to(DEVICE)[:, 7:47]
    assert_is_topk(x, *sae_kernels.topk(x, 4, impl=impl), 4)
    with record_launches() as launches:
        launch_topk(x, 4)
    assert launches[0].args[0].data_ptr() == x.data_ptr()


@needs_triton
def test_elements_that_are_not_neighbours(generator) -> None:
    x = torch.randn(40, 2, generator=generator).to(DEVICE).T
    assert_is_topk(x, *sae_kernels.topk(x, 3, impl="triton"), 3)


@needs_triton
def test_a_missing_piece_is_below_minus_infinity() -> None:
    """Group 3's second piece lies past the row; among equals it would come before real ones."""
    x = torch.full((1, 7), -INF).to(DEVICE)
    x[0, 3] = 0
    assert_is_topk(x, *launch_groups(x, 4, Groups(n_groups=4, pieces=2, piece=1)), 4)


@needs_triton
@each_kernel
def test_rows_past_2_to_the_31_elements(kernel: str, tmp_path: Path, generator) -> None:
    """The stride fits 32 bits, its product with the row does not."""
    stride, rows = 2**30 + 16, torch.randn(3, 20, generator=generator).half()
    file = tmp_path / "sparse"
    with file.open("wb") as sink:  # a hole: takes no space on disk or in memory
        sink.truncate((2 * stride + 32) * 2)
    whole = torch.from_file(str(file), size=2 * stride + 32, dtype=torch.float16, shared=True)
    x = whole.to(DEVICE).as_strided((3, 20), (stride, 1))
    x.copy_(rows)
    assert_is_topk(x, *run_kernel(kernel, x, 3), 3)


@needs_triton
def test_sorted_with_a_kernel_puts_nan_first(generator) -> None:
    x = hard_rows(37, generator)[[0, 3]].to(DEVICE)
    values, indices = sae_kernels.topk(x, 6, sorted=True, impl="triton")
    torch.testing.assert_close(values, x.topk(6)[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bits(x.gather(1, indices)), bits(values))


@pytest.mark.parametrize("sorted", [False, True])
@pytest.mark.parametrize("impl", ["auto", "reference", pytest.param("triton", marks=needs_triton)])
def test_gradient_goes_to_the_winners(sorted: bool, impl, generator) -> None:
    x = torch.randn(2, 1, 40, generator=generator).to(DEVICE).requires_grad_()
    values, indices = sae_kernels.topk(x, 3, sorted=sorted, impl=impl)
    weights = torch.randn(values.shape, generator=generator).to(DEVICE)
    (values * weights).sum().backward()
    assert not indices.requires_grad
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x).scatter(-1, indices, weights))


@pytest.mark.parametrize("shape", [(300,), (0, 300), (3, 2, 300), (2, 0, 300), (1, 900)])
@pytest.mark.parametrize("k", [1, 4, 200])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_any_leading_shape(shape: tuple[int, ...], k: int, impl, generator) -> None:
    x = torch.randn(shape, generator=generator)
    assert_is_topk(x, *sae_kernels.topk(x, k, impl=impl), k)


@needs_triton
@pytest.mark.parametrize("shape", [(20,), (0, 20), (1, 2, 20), (2, 0, 20)])
def test_any_leading_shape_with_a_kernel(shape: tuple[int, ...], generator) -> None:
    x = torch.randn(shape, generator=generator).to(DEVICE)
    assert_is_topk(x, *sae_kernels.topk(x, 2, impl="triton"), 2)


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


def test_gradient_of_the_gradient(generator) -> None:
    x = torch.randn(2, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: sae_kernels.topk(x, 2)[0] ** 2, (x,))


def test_gpu_groups_balance_maxima_and_candidates() -> None:
    assert gpu_group_size(131_072, 64) == 64
    assert gpu_group_size(24_576, 32) == 32
    for width, k in [(64, 1), (64 * 128, 128), (1_048_576, 64)]:
        assert width // gpu_group_size(width, k) >= k
    assert MIN_ROW_PER_K >= CPU_GROUP_SIZE  # so at least k groups exist


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 2**22), k=st.integers(1, 5000), itemsize=st.sampled_from([2, 4]))
def test_a_cut_covers_the_row_and_fits_a_program(width: int, k: int, itemsize: int) -> None:
    groups = best_groups(width, k, itemsize)
    if groups is None:
        return
    assert groups.n_groups >= k  # k groups exist
    assert groups.n_groups * groups.piece <= width  # and each has elements
    assert groups.n_groups * groups.piece * groups.pieces >= width
    n_groups, n_pieces, n_candidates = groups.selections(k)
    assert max(n_groups, n_pieces) <= MAX_PIECES
    assert n_candidates <= MAX_KEYS


def test_choice_of_kernel() -> None:
    for width, k in [(24_576, 32), (65_536, 64), (131_072, 64), (1_048_576, 64)]:
        for itemsize in (2, 4):
            assert isinstance(choose_kernel(width, k, itemsize), Groups)
    assert choose_kernel(131_072, 64, 2) == Groups(n_groups=1024, pieces=16, piece=8)
    assert choose_kernel(8192, 2048, 2) == "direct"
    assert choose_kernel(64, 64, 4) == choose_kernel(1000, 1, 2) == "direct"
    assert choose_kernel(131_072, 8192, 2) == "streaming"
    assert choose_kernel(8193, 8193, 4) == "streaming"


@needs_triton
def test_the_launcher_takes_the_chosen_kernel() -> None:
    for width, k, name in [(4096, 2, "groups"), (640, 2, "direct"), (9000, 8999, "streaming")]:
        with record_launches() as launches:
            values, indices = launch_topk(torch.empty(5, width, device="meta"), k)
        assert [str(launch.kernel.__name__) for launch in launches] == [f"{name}_kernel"]
        assert values.shape == indices.shape == (5, k)


def test_a_few_long_rows_with_many_winners_are_left_to_torch() -> None:
    rows = torch.empty(64, 131_072, device="meta")
    assert _too_few_rows(rows[:3], 8192)
    assert not _too_few_rows(rows, 8192)
    assert not _too_few_rows(rows[:3], 64)


@pytest.mark.parametrize("with_triton", [False, pytest.param(True, marks=needs_triton)])
def test_rows_for_other_ops(with_triton: bool, generator) -> None:
    x = torch.randn(3, 60, generator=generator).to(DEVICE)[:, :40].requires_grad_()
    values, indices = topk_rows(x, 3, with_triton)
    assert not values.requires_grad
    assert_is_topk(x.detach(), values, indices, 3)


@pytest.mark.parametrize("with_triton", [False, pytest.param(True, marks=needs_triton)])
def test_opcheck(with_triton: bool, generator) -> None:
    x = torch.randn(1, 20, generator=generator).to(DEVICE).requires_grad_()
    torch.library.opcheck(topk_op, (x, 2, True, with_triton))


@pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=needs_triton)])
def test_compiles(impl, generator) -> None:
    x = torch.randn(2, 40, generator=generator).to(DEVICE).requires_grad_()
    compiled = torch.compile(sae_kernels.topk, fullgraph=True, backend="aot_eager")
    values, indices = compiled(x, 3, impl=impl)
    values.sum().backward()
    assert_is_topk(x.detach(), values.detach(), indices, 3)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x).scatter(1, indices, 1.0))


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
    with pytest.raises(RuntimeError, match="`topk` with impl='triton' must have Triton"):
        sae_kernels.topk(torch.zeros(2, 20, dtype=torch.float64), 1, impl="triton")


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_check_finite(bad: float, impl) -> None:
    x = torch.zeros(2, 20)
    sae_kernels.topk(x, 1, impl=impl, check_finite=True)
    x[1, 3] = bad
    sae_kernels.topk(x, 1, impl=impl)
    with pytest.raises(ValueError, match="`x` must be finite; got 1 NaN or infinite of 40"):
        sae_kernels.topk(x, 1, impl=impl, check_finite=True)
