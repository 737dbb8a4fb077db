"""batch_topk: exact over the whole batch with its tie rule, in every form, with its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, HALF, each_dtype, outputs_and_gradients
from torch import Tensor

from sae_kernels import batch_selection as module
from sae_kernels.batch_selection import (
    Cut,
    Selection,
    batch_topk,
    batch_topk_by_groups,
    batch_topk_on_cpu,
    batch_topk_rows,
    cut_for,
    digits_of,
    group_size_for,
    histogram_where,
    launch_batch_topk,
    launch_surviving_groups,
    places_of_segments,
    sums_up_to,
)
from sae_kernels.launching import HAS_TRITON, launch, record_launches, tl, triton

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

SPECIAL = [0.0, -0.0, 1.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, -math.nan]
FLOATS = [torch.float32, *HALF]


def kept_in_python(x: Tensor, k_total: int) -> list[int]:
    """The flat positions of the winners by Python's own stable sort: NaN first, then descending."""
    flat = x.double().flatten().tolist()
    keys = [(0, 0.0) if math.isnan(value) else (1, -value) for value in flat]
    return sorted(sorted(range(len(flat)), key=keys.__getitem__)[:k_total])


def smallest(values: Tensor) -> Tensor:
    numbers = values[~values.isnan()]
    return numbers.amin() if numbers.numel() else values[0]


def assert_is_batch_topk(x: Tensor, k_total: int, found: Selection) -> None:
    values, indices, offsets, threshold = (tensor.detach().cpu() for tensor in found)
    x = x.detach().cpu()
    n, width = x.shape
    positions = torch.tensor(kept_in_python(x, k_total))
    assert torch.equal(indices, positions % width)
    assert indices.dtype == offsets.dtype == torch.int64
    assert offsets.tolist() == [int((positions < row * width).sum()) for row in range(n + 1)]
    assert values.dtype == threshold.dtype == x.dtype
    assert threshold.shape == ()
    # Bits, not numbers: an element comes out as it went in, NaN's payload and the sign of 0 too.
    assert torch.equal(bits_of(values), bits_of(x.reshape(-1)[positions]))
    torch.testing.assert_close(threshold, smallest(values), rtol=0, atol=0, equal_nan=True)


def bits_of(values: Tensor) -> Tensor:
    size = values.element_size()
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


def run(x: Tensor, k_total: int, **options) -> Selection:
    ragged, threshold = batch_topk(x.to(DEVICE), k_total, **options)
    return (*ragged, threshold)


def as_rows(values: list[float], n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values).reshape(n, -1).to(dtype)


# ---- the torch forms


@st.composite
def special_batches(draw, most: int = 24) -> tuple[Tensor, int]:
    """A tiny x whose elements are mostly equal to others, and a k_total."""
    n, width = draw(st.integers(1, 4)), draw(st.integers(1, most // 4))
    choices = draw(st.sampled_from([SPECIAL, SPECIAL[:2], SPECIAL[-2:], SPECIAL[2:4]]))
    values = draw(st.lists(st.sampled_from(choices), min_size=n * width, max_size=n * width))
    dtype = draw(st.sampled_from([torch.float64, *FLOATS]))
    return as_rows(values, n, dtype), draw(st.integers(1, n * width))


@settings(max_examples=150, deadline=None)
@given(batch=special_batches(), group_size=st.integers(1, 5))
def test_torch_forms_are_exact_with_ties_nan_and_infinities(batch, group_size: int) -> None:
    x, k_total = batch
    if k_total > x.numel() // group_size:
        group_size = 1
    assert_is_batch_topk(x, k_total, run(x, k_total, impl="reference"))
    for form in (batch_topk_by_groups, batch_topk_on_cpu):
        assert_is_batch_topk(x, k_total, form(x, k_total, group_size=group_size))


@pytest.mark.parametrize(("n", "width", "k_total"), [(13, 157, 1), (13, 157, 40), (60, 50, 900)])
@pytest.mark.parametrize("group_size", [1, 3, 16])
@each_dtype
def test_torch_forms_are_exact(n, width, k_total, group_size: int, dtype, generator) -> None:
    x = torch.randn(n, width, generator=generator).to(dtype)
    if k_total > x.numel() // group_size:
        group_size = 1
    for form in (batch_topk_by_groups, batch_topk_on_cpu):
        assert_is_batch_topk(x, k_total, form(x, k_total, group_size=group_size))


@pytest.mark.parametrize("group_size", [2, 3, 5])
@pytest.mark.parametrize("k_total", [1, 2, 4])
def test_the_tail_that_fills_no_group_is_always_a_candidate(group_size: int, k_total: int) -> None:
    x = torch.arange(29.0)[None]
    assert x.numel() % group_size
    for form in (batch_topk_by_groups, batch_topk_on_cpu):
        assert_is_batch_topk(x, k_total, form(x, k_total, group_size=group_size))


def test_nan_is_found_by_numpys_partition_of_long_arrays(generator) -> None:
    """Long enough for its vector code, which sorts NaN apart."""
    x = torch.randn(40, 500, generator=generator)
    x.view(-1)[::7] = math.nan
    x.view(-1)[::9] = -math.nan
    for k_total in (100, 5000, 19_999):
        for group_size in (1, 4) if k_total == 100 else (1,):
            found = batch_topk_on_cpu(x, k_total, group_size=group_size)
            assert_is_batch_topk(x, k_total, found)


def test_group_sizes() -> None:
    n, width = 8192, 131_072
    assert group_size_for(n * width, n * 64, 64) == 32
    assert group_size_for(4096 * 4608, 131_072, 32) == 8
    assert group_size_for(n * width, 1, 64) == 64
    assert group_size_for(10, 1, 64) == 1  # too few elements
    assert group_size_for(n * width, n * width // 8, 64) == 1
    for k_total in (1, 10, 1000, n * width // 16):
        assert n * width // group_size_for(n * width, k_total, 64) >= k_total


# ---- the Triton form; the interpreter takes 10 ms and more a program


@settings(max_examples=12, deadline=None)
@given(batch=special_batches(most=32), all_groups=st.booleans())
def test_triton_is_exact_with_ties_nan_and_infinities(batch, all_groups: bool) -> None:
    x, k_total = batch
    if x.dtype == torch.float64:
        x = x.bfloat16()
    cut = Cut(2, 8, all_groups or k_total > x.shape[0] * math.ceil(x.shape[1] / 2))
    assert_is_batch_topk(x, k_total, launch_batch_topk(x.to(DEVICE), k_total, cut))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k_total", [7, 100])
def test_triton_is_exact(k_total: int, dtype: torch.dtype, generator) -> None:
    """By groups (k_total 7) and without them, through the public op and its own cut."""
    x = (3 * torch.randn(3, 133, generator=generator)).to(dtype)
    assert cut_for(3, 133, k_total).all_groups == (k_total == 100)
    assert_is_batch_topk(x, k_total, run(x, k_total, impl="triton"))


@pytest.mark.parametrize("all_groups", [False, True])
def test_triton_cuts_rows_into_segments_and_loops_over_their_tiles(
    all_groups: bool, monkeypatch, generator
) -> None:
    """Ties at the threshold cross tiles, segments, programs and rows."""
    monkeypatch.setattr(module, "MEMBER_TILE", 8)  # two groups of a segment at a time
    monkeypatch.setattr(module, "MAXIMA_TILE", 16)
    monkeypatch.setattr(module, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(module, "COUNT_BLOCK", 4)
    x = torch.randint(0, 4, (2, 23), generator=generator).half()
    cut = Cut(4, 4, all_groups)
    assert cut.n_chunks(23) == 2
    k_total = 16 if all_groups else 11
    assert k_total != int((x >= 3).sum())
    assert_is_batch_topk(x, k_total, launch_batch_topk(x.to(DEVICE), k_total, cut))


def test_triton_leaves_out_the_groups_below_t0(monkeypatch, generator) -> None:
    """What survives is not only enough but no more than it need be: bf16's keys round nothing."""
    monkeypatch.setattr(module, "COUNT_BLOCK", 4)
    monkeypatch.setattr(module, "MOST_PROGRAMS", 2)
    x = torch.randn(2, 48, generator=generator).bfloat16()
    maxima = x.view(2, 12, 4).amax(2)
    survives = maxima >= maxima.flatten().sort(descending=True)[0][6]
    ids, counts = launch_surviving_groups(x.to(DEVICE), 7, Cut(4, 16, False))
    assert counts.tolist() == survives.sum(1).tolist()
    for row in range(2):
        assert ids[row, : counts[row]].tolist() == survives[row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("k_total", [1, 5])
def test_one_row_may_hold_all_winners(impl: str, k_total: int) -> None:
    x = torch.zeros(3, 60)
    x[1, 7:12] = torch.arange(1.0, 6.0)
    found = run(x, k_total, impl=impl)
    assert found[2].tolist() == [0, 0, k_total, k_total]
    assert_is_batch_topk(x, k_total, found)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("value", [0.5, math.nan, -math.inf])
def test_all_equal_keeps_the_first(impl: str, value: float) -> None:
    x = torch.full((2, 70), value)
    for k_total in (1, 71):
        found = run(x, k_total, impl=impl)
        assert found[2].tolist() == [0, min(k_total, 70), k_total]
        assert_is_batch_topk(x, k_total, found)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("k_total", [3, 30])
def test_zeros_of_either_sign_are_ties(impl: str, k_total: int) -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0]).repeat(2, 12)
    assert_is_batch_topk(x, k_total, run(x, k_total, impl=impl))


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize(("n", "width"), [(1, 1), (1, 40), (3, 1)])
def test_keeps_all(impl: str, n: int, width: int, generator) -> None:
    x = torch.randn(n, width, generator=generator)
    values, indices, offsets, _ = run(x, n * width, impl=impl)
    assert torch.equal(values.cpu(), x.view(-1))
    assert torch.equal(indices.cpu(), torch.arange(n * width) % width)
    assert torch.equal(offsets.cpu(), torch.arange(n + 1) * width)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("strides", ["rows", "columns", "expanded"])
def test_strided_rows(impl: str, strides: str, generator) -> None:
    x = torch.randn(6, 80, generator=generator, device="cpu")
    x = {"rows": x[::2, 3:73], "columns": x.T[:5], "expanded": x[:1].expand(3, 80)}[strides]
    assert_is_batch_topk(x, 4, run(x, 4, impl=impl))


def test_row_strided_x_is_not_copied() -> None:
    x = torch.empty(4, 160, device="meta")[:, :70]
    with record_launches() as launches:
        launch_batch_topk(x, 3)
    assert all(launch.args[0] is x for launch in launches if launch.args[0].is_floating_point())
    assert len({launch.kernel for launch in launches}) == 7


def test_digits_cover_all_bits() -> None:
    assert digits_of(16) == [(8, 16), (0, 8)]
    assert digits_of(19) == [(11, 19), (3, 11), (0, 3)]
    assert digits_of(32) == [(24, 32), (16, 24), (8, 16), (0, 8)]


def test_cuts_hold_their_bounds() -> None:
    """Ids of 16 bits and tiles of fewer than 2¹⁵ elements are what the kernels count on."""
    for n, width, k_total in [(8192, 131_072, 524_288), (1, 2**31, 4), (2, 3, 6), (9, 2**21, 9)]:
        cut = cut_for(n, width, k_total)
        constants = cut.constants()
        assert cut.chunk <= 2**15
        assert constants["TILE_GROUPS"] * cut.group < 2**15
        assert all(size & (size - 1) == 0 for size in constants.values())
        assert cut.n_chunks(width) * cut.chunk * cut.group >= width
        assert cut.all_groups or n * cut.n_groups(width) >= k_total


def test_places_of_segments() -> None:
    """Two rows of two segments; of six ties the first three are kept, counts past 2³¹ included."""
    above, equal = torch.tensor([2, 0, 1, 2**31 - 1]), torch.tensor([1, 0, 4, 1])
    begins, ties, offsets = places_of_segments(above.int(), equal.int(), torch.tensor(3), 2)
    assert ties.tolist() == [1, 0, 2, 0]
    assert begins.tolist() == [0, 3, 3, 6]
    assert offsets.tolist() == [0, 3, 6 + 2**31 - 1]


# ---- gradients and the ways an op is called


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_scattered_into_zeros(impl: str, dtype: torch.dtype, generator) -> None:
    x = torch.randn(3, 50, generator=generator).to(DEVICE, dtype).requires_grad_()
    ragged, threshold = batch_topk(x, 7, impl=impl)
    weights = torch.arange(1.0, 8.0, device=DEVICE).to(dtype)
    (ragged.values * weights).sum().backward()
    expected = torch.zeros(150, dtype=dtype, device=DEVICE)
    expected[kept_in_python(x, 7)] = weights
    assert x.grad is not None
    assert torch.equal(x.grad, expected.view(3, 50))
    assert not threshold.requires_grad
    assert not ragged.indices.requires_grad


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("k_total", [2, 30])
def test_gradcheck(impl: str, k_total: int, generator) -> None:
    x = torch.randn(3, 20, generator=generator, dtype=torch.float64, requires_grad=True)

    def values(x: Tensor) -> Tensor:
        return batch_topk(x, k_total, impl=impl)[0].values

    assert torch.autograd.gradcheck(values, (x,))
    assert torch.autograd.gradgradcheck(values, (x,))


@pytest.mark.parametrize("with_triton", [False, True])
def test_opcheck(with_triton: bool, generator) -> None:
    x = torch.randn(2, 40, generator=generator).to(DEVICE)
    for leaf in (x, x.clone().requires_grad_()):
        torch.library.opcheck(batch_topk_rows, (leaf, 3, with_triton))


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_compiles_with_gradients(impl: str, generator) -> None:
    x = torch.randn(2, 90, generator=generator).to(DEVICE)

    def values(x: Tensor) -> Tensor:
        ragged, threshold = batch_topk(x, 5, impl=impl)
        return ragged.values * 2 + threshold

    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(values, [x])
    for ours, theirs in zip(outputs_and_gradients(compiled, [x]), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_bitwise_reproducible(impl: str, generator) -> None:
    x = torch.randint(0, 3, (2, 60), generator=generator).float()
    once, again = run(x, 9, impl=impl), run(x, 9, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_impl_chooses_the_form(monkeypatch) -> None:
    """auto is Triton on a GPU, save for float64, and never on a CPU."""
    called = []

    def noting(name: str):
        original = getattr(module, name)

        def note(*args, **options) -> Selection:
            called.append(name)
            return original(*args, **options)

        return note

    for name in ("launch_batch_topk", "batch_topk_on_cpu", "batch_topk_by_groups"):
        monkeypatch.setattr(module, name, noting(name))
    x = torch.arange(6.0, device=DEVICE).view(2, 3)
    for impl in ("reference", "triton", "auto"):
        batch_topk(x, 2, impl=impl)
    batch_topk(x.double(), 2)
    on_gpu = ["launch_batch_topk", "batch_topk_by_groups", "batch_topk_by_groups"]
    on_cpu = ["launch_batch_topk", "batch_topk_on_cpu", "batch_topk_on_cpu"]
    assert called == (on_gpu if x.is_cuda else on_cpu)


@pytest.mark.parametrize("k_total", [0, 7, -1])
def test_k_total_out_of_range(k_total: int) -> None:
    message = rf"`k_total` must be in \[1, n·F\]; got k_total={k_total}, n·F=6\. Lower"
    with pytest.raises(ValueError, match=message):
        batch_topk(torch.zeros(2, 3), k_total)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_x(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"got k_total=1, n·F=0"):
        batch_topk(torch.zeros(shape), 1)


def test_shape_dtype_and_impl_errors() -> None:
    with pytest.raises(ValueError, match=r"`x` must have shape \(n, F\); got \(2, 3, 4\)"):
        batch_topk(torch.zeros(2, 3, 4), 1)
    with pytest.raises(TypeError, match=r"`x` must be floating point; got torch\.int64"):
        batch_topk(torch.zeros(2, 3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"`impl` must be one of .*; got 'fast'"):
        batch_topk(torch.zeros(2, 3), 1, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"`batch_topk` with impl='triton' .*float64"):
        batch_topk(torch.zeros(2, 3, dtype=torch.float64, device=DEVICE), 1, impl="triton")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_finite(bad: float) -> None:
    x = torch.zeros(2, 3)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="`x` must be finite; got 1 NaN or infinite of 6"):
        batch_topk(x, 1, check_finite=True)
    batch_topk(x, 1)
    batch_topk(torch.zeros(2, 3), 1, check_finite=True)


# ---- at the sizes of dictionaries, whose tiles the interpreter would take minutes for


@triton.jit
def tile_kernel(x_ptr, mask_ptr, sums_ptr, counts_ptr, R: tl.constexpr, G: tl.constexpr):
    at = tl.arange(0, R)[:, None] * G + tl.arange(0, G)[None, :]
    x, mask = tl.load(x_ptr + at), tl.load(mask_ptr + at) != 0
    tl.store(sums_ptr + at, sums_up_to(x))
    counts = histogram_where(mask, x & 255, R * G)
    tl.store(counts_ptr + tl.arange(0, 256), counts)


@needs_triton
@pytest.mark.parametrize(("rows", "group"), [(512, 4), (256, 8), (128, 16), (64, 32), (32, 64)])
def test_sums_and_histograms_of_a_tile(rows: int, group: int, generator) -> None:
    x = torch.randint(0, 2**16, (rows, group), generator=generator, dtype=torch.int32).to(DEVICE)
    mask = torch.randint(0, 2, (rows, group), generator=generator, dtype=torch.int32).to(DEVICE)
    sums, counts = torch.zeros_like(x), x.new_zeros(256)
    launch(tile_kernel, (1,), x, mask, sums, counts, R=rows, G=group)
    assert torch.equal(sums.flatten().long(), x.flatten().long().cumsum(0))
    expected = torch.bincount((x & 255)[mask != 0].long(), minlength=256)
    assert torch.equal(counts.long()[1:], expected[1:])
    assert counts[0] >= expected[0]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "width", "k"),
    [(1024, 4096, 60), (1024, 4096, 25), (512, 24_576, 32), (64, 131_072, 64), (700, 1000, 3)],
)
def test_triton_is_exact_at_real_sizes(n: int, width: int, k: int, dtype, generator) -> None:
    x = torch.randn(n, width, generator=generator).to(DEVICE, dtype)
    found, threshold = batch_topk(x, n * k, impl="triton")
    expected, expected_threshold = batch_topk(x, n * k, impl="reference")
    assert threshold == expected_threshold
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)
