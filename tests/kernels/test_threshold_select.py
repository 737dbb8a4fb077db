"""threshold_select: both lists against dense masks, in every form, and the paper's gradients."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import AbstractContextManager, ExitStack
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    HALF,
    assert_obeys_law,
    ignore_dynamo_deprecation,
    needs_triton,
    outputs_and_gradients,
)
from torch import Tensor

from sae_kernels import (
    Selected,
    sparse_decode,
    sparse_decode_reference,
    threshold_select,
)
from sae_kernels import threshold_selection as module
from sae_kernels.launching import HAS_TRITON, launch, record_launches
from sae_kernels.ragged import Ragged, tokens_of_pairs

# "cpu" is the fast form of a CPU and "torch" that of a GPU without Triton, which runs anywhere.
FORMS = ["reference", "cpu", "torch", *(["triton"] if HAS_TRITON else [])]
each_form = pytest.mark.parametrize("form", FORMS)
SPECIAL = [0.0, -0.0, 0.125, 0.25, 0.5, 0.75, 1.0, -0.5, -1.0, 3.0, math.inf, -math.inf, math.nan]


def device_of(form: str) -> str:
    return "cpu" if form == "cpu" else DEVICE


def forced(form: str) -> AbstractContextManager[object]:
    """Make the op take the torch form that a GPU has, on whatever device."""
    stack = ExitStack()
    if form == "torch":
        stack.enter_context(patch.object(module, "cpu_lists", module.torch_lists))
        stack.enter_context(patch.object(module, "choose_form", lambda *_: "torch"))
    return stack


def select(form: str, x: Tensor, theta: Tensor, **options) -> Selected:
    """Run one form of the op, on the device where it runs."""
    device = device_of(form)
    impl = form if form in ("reference", "triton") else "auto"
    with forced(form):
        return threshold_select(x.to(device), theta.to(device), impl=impl, **options)


def in_window(x: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """The paper's window, fired or not."""
    return (x.double() - theta.double()).abs() < bandwidth / 2


def assert_is_list(code: Ragged, x: Tensor, mask: Tensor, values: Tensor) -> None:
    """`code` holds just the elements of `values` where `mask` is, and padding behind them."""
    values, indices, offsets = values.cpu(), code.indices.cpu(), code.offsets.cpu()
    p = int(mask.sum())
    assert code.values.dtype == x.dtype
    assert indices.dtype == offsets.dtype == torch.int64
    assert offsets.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert torch.equal(indices[:p], mask.nonzero(as_tuple=True)[1])
    assert torch.equal(code.values.detach().cpu()[:p], values[mask])
    assert code.values.shape == indices.shape
    assert not code.values[p:].any()
    assert not indices[p:].any()


def assert_is_selection(
    found: Selected, x: Tensor, theta: Tensor, bandwidth: float | None = None
) -> None:
    """The lists are those of the dense masks, and together the paper's window."""
    fired = x.double() > theta.double()
    assert_is_list(found.latents, x, fired, x)
    l0 = torch.tensor(fired.sum().item() / max(len(x), 1)).to(found.l0.cpu())
    torch.testing.assert_close(found.l0.detach().cpu(), l0)
    assert found.l0.dtype == (
        torch.float64 if torch.float64 in (x.dtype, theta.dtype) else torch.float32
    )
    if bandwidth is None:
        assert found.window is None
        return
    near = in_window(x, theta, bandwidth)
    assert_is_list(found.window, x, near & ~fired, torch.zeros_like(x))
    latents = found.latents
    p = int(latents.offsets[-1])
    at = theta.expand(x.shape[1])[latents.indices[:p].cpu()]
    n_near = int(in_window(latents.values[:p].detach().cpu(), at, bandwidth).sum())
    assert n_near + int(found.window.offsets[-1]) == int(near.sum())


def draw(n: int, width: int, generator: torch.Generator, dtype=torch.float32):
    """x and theta of which about a tenth fires; sixteenths, so that differences are exact."""
    x = torch.randint(-40, 41, (n, width), generator=generator) / 16
    theta = torch.randint(24, 40, (width,), generator=generator) / 16
    return x.to(dtype), theta.to(dtype)


# ---- exactness


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bandwidth", [None, 0.25])
def test_every_pair_of_special_values(form: str, dtype, bandwidth) -> None:
    """Ties, zeros of both signs, infinities and NaN, each against each."""
    theta = torch.tensor(SPECIAL, dtype=dtype)
    x = theta[:, None].expand(-1, len(SPECIAL)).contiguous()
    assert_is_selection(select(form, x, theta, bandwidth=bandwidth), x, theta, bandwidth)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), n=st.integers(0, 5), is_scalar=st.booleans())
def test_any_elements_and_thresholds(data, n: int, is_scalar: bool) -> None:
    width = data.draw(st.sampled_from([1, 2, 31, 32, 33, 70]))
    dtype = data.draw(st.sampled_from([torch.float32, *HALF]))
    bandwidth = data.draw(st.sampled_from([None, 0.25, 0.5, 2.0]))
    element = st.sampled_from(SPECIAL)
    theta = torch.tensor(data.draw(st.lists(element, min_size=width, max_size=width))).to(dtype)
    drawn = data.draw(st.lists(element, min_size=n * width, max_size=n * width))
    x = torch.tensor(drawn).to(dtype).view(n, width)
    if is_scalar:
        theta = theta[0].clone()
    for form in FORMS:
        assert_is_selection(select(form, x, theta, bandwidth=bandwidth), x, theta, bandwidth)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (form, dtype)
        for form in FORMS
        for dtype in (torch.float64, torch.float32, *HALF)
        if (form, dtype) != ("triton", torch.float64)
    ],
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (3, 33), (2, 64), (0, 40), (3, 1)])
def test_shapes_and_dtypes(
    form: str, dtype: torch.dtype, shape: tuple[int, int], generator
) -> None:
    x, theta = draw(*shape, generator, dtype)
    for thresholds in (theta, theta[0].clone(), theta.float()):
        found = select(form, x, thresholds, bandwidth=0.5)
        assert_is_selection(found, x, thresholds, 0.5)


@each_form
def test_rows_longer_than_a_chunk_and_without_a_cap(form: str, generator) -> None:
    """Several chunks a row, the last one short; a row of which all fires, and one of which none."""
    x, theta = draw(5, 2500, generator)
    x[1], x[3] = 5, -5
    with patch.object(module, "CHUNK", 32), patch.object(module, "CPU_BLOCK", 5000):
        found = select(form, x, theta, bandwidth=1.0)
    assert_is_selection(found, x, theta, 1.0)
    assert found.latents.offsets.diff()[[1, 3]].tolist() == [2500, 0]


@each_form
@pytest.mark.parametrize("level", [-math.inf, math.inf])
def test_all_fire_or_none(form: str, level: float, generator) -> None:
    x, _ = draw(4, 37, generator)
    theta = torch.full((37,), level)
    found = select(form, x, theta, bandwidth=1.0)
    assert_is_selection(found, x, theta, 1.0)
    assert len(found.latents.values) == (148 if level < 0 else 0)


@each_form
def test_bfloat16_elements_are_compared_with_float32_thresholds(form: str) -> None:
    """A threshold between two bfloat16 numbers must not be rounded to one of them."""
    x = torch.tensor([[1.0, 1.0078125, 1.015625]], dtype=torch.bfloat16)
    theta = torch.tensor([1.005, 1.005, 1.0157])
    for thresholds, expected in ((theta, [1]), (torch.tensor(1.005), [1, 2])):
        found = select(form, x, thresholds, bandwidth=0.002)
        assert found.latents.indices.tolist() == expected


@each_form
def test_strides(form: str, generator) -> None:
    x, theta = draw(6, 80, generator)
    wide = torch.full((6, 100), 9.0)
    wide[:, 7:87] = x
    columns = x.T.contiguous().T
    spread = torch.full((160,), 9.0)
    spread[::2] = theta
    for rows in (wide[:, 7:87], columns, x[:1].expand(6, 80)):
        found = select(form, rows, spread[::2], bandwidth=0.5)
        assert_is_selection(found, rows, theta, 0.5)
    level = torch.tensor(0.5)
    assert_is_selection(select(form, x, level.expand(80)), x, level)


# ---- capacities


@each_form
@pytest.mark.parametrize("room", [0, 1, 9])
def test_capacities_pad_with_zeros(form: str, room: int, generator) -> None:
    x, theta = draw(4, 45, generator)
    exact = threshold_select(x, theta, bandwidth=0.5)
    sizes = len(exact.latents.values) + room, len(exact.window.values) + room
    given_sizes = dict(zip(("capacity", "window_capacity"), sizes, strict=True))
    found = select(form, x, theta, bandwidth=0.5, **given_sizes)
    assert_is_selection(found, x, theta, 0.5)
    assert (len(found.latents.values), len(found.window.values)) == sizes
    only_one = select(form, x, theta, bandwidth=0.5, capacity=sizes[0])
    assert_is_selection(only_one, x, theta, 0.5)
    assert len(only_one.window.values) == sizes[1] - room


@each_form
@pytest.mark.parametrize("capacity", [0, 5])
def test_no_rows_are_all_padding(form: str, capacity: int) -> None:
    x, theta = torch.zeros(0, 40), torch.zeros(40)
    found = select(form, x, theta, bandwidth=0.5, capacity=capacity, window_capacity=2)
    assert_is_selection(found, x, theta, 0.5)
    assert (len(found.latents.values), len(found.window.values)) == (capacity, 2)


@pytest.mark.parametrize("form", [form for form in FORMS if device_of(form) == "cpu"])
@pytest.mark.parametrize("name", ["capacity", "window_capacity"])
def test_overflow_is_loud(form: str, name: str, generator) -> None:
    x, theta = draw(4, 45, generator)
    n_pairs = {
        "capacity": len(threshold_select(x, theta).latents.values),
        "window_capacity": len(threshold_select(x, theta, bandwidth=0.5).window.values),
    }
    given_sizes = n_pairs | {name: n_pairs[name] - 1}
    message = f"`{name}` must be at least .* got {name}={n_pairs[name] - 1} and {n_pairs[name]} pa"
    with pytest.raises(ValueError, match=message):
        select(form, x, theta, bandwidth=0.5, **given_sizes)
    # As on a GPU, where the host does not look at the count.
    blind = patch.object(module, "_host_knows", lambda _: False)
    if form != "reference":
        with blind, pytest.raises(RuntimeError, match=f"`{name}` must be at least"):
            select(form, x, theta, bandwidth=0.5, **given_sizes)
    with blind:
        assert_is_selection(select(form, x, theta, bandwidth=0.5, **n_pairs), x, theta, 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_overflow_on_a_gpu_is_an_error_of_the_device() -> None:
    """In a process of its own, since it ends the use of the GPU."""
    code = (
        "import torch; from sae_kernels.threshold_selection import threshold_select as t;"
        "t(torch.ones(2, 40).cuda(), torch.zeros(40).cuda(), capacity=79);"
        "torch.cuda.synchronize()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "assert" in ran.stderr


def test_offsets_never_point_past_the_end() -> None:
    """So that nothing reads out of bounds before an overflow surfaces on a GPU."""
    ends = torch.tensor([3, 5, 9, 12])
    assert module._offsets(ends, 2, 7).tolist() == [0, 5, 7]


# ---- gradients


def paper_gradients(x, theta, W_dec, target, bandwidth: float, l0_weight: float) -> list[Tensor]:
    """dL/dx, dL/dtheta, dL/dW_dec of `loss_of`, by the paper's equations on dense arrays."""
    n = len(x)
    fired, kernel = (x > theta).double(), in_window(x, theta, bandwidth).double()
    a = x * fired
    error = a @ W_dec - target
    grad_a = 2 * error @ W_dec.T / n + (1 - torch.tanh(a) ** 2)
    grad_jump = -(theta / bandwidth) * kernel * grad_a - l0_weight / n * kernel / bandwidth
    return [grad_a * fired, grad_jump.sum(0), a.T @ (2 * error / n)]


def loss_of(found: Selected, W_dec, target, l0_weight: float, decode) -> Tensor:
    """Squared error, l0 and another penalty of the activations, as the docstring recommends."""
    x_hat, penalty = (
        torch.zeros_like(target),
        torch.zeros((), dtype=target.dtype, device=target.device),
    )
    for code in (found.latents, found.window):
        x_hat = x_hat + decode(code.values, code.indices, W_dec, offsets=code.offsets)
        penalty = penalty + torch.tanh(code.values).sum()
    return (x_hat - target).square().sum(-1).mean() + l0_weight * found.l0 + penalty


@ignore_dynamo_deprecation
@each_form
@pytest.mark.parametrize("decode", [sparse_decode_reference, sparse_decode])
@pytest.mark.parametrize("room", [None, 3])
def test_recommended_use_has_the_papers_gradients(form, decode, room, generator) -> None:
    dtype = torch.float32 if form == "triton" else torch.float64
    x, theta = draw(12, 70, generator, torch.float64)
    W_dec, target = (torch.randn(*s, generator=generator).double() for s in ((70, 5), (12, 5)))
    expected = paper_gradients(x, theta, W_dec, target, 0.75, 0.3)
    leaves = [t.to(device_of(form), dtype).requires_grad_() for t in (x, theta, W_dec)]
    options: dict = {"bandwidth": 0.75}
    if room is not None:
        exact = threshold_select(x, theta, bandwidth=0.75)
        options["capacity"] = len(exact.latents.values) + room
        options["window_capacity"] = len(exact.window.values) + room
    found = select(form, *leaves[:2], **options)
    loss_of(found, leaves[2], target.to(leaves[2]), 0.3, decode).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(
            leaf.grad.cpu().double(), gradient, rtol=tolerance, atol=tolerance
        )


def test_the_window_changes_no_value(generator) -> None:
    """x_hat and W_dec's gradient are those of the latents alone, bit for bit."""
    x, theta = draw(12, 70, generator)
    (latents, window, _), W_dec = threshold_select(x, theta, bandwidth=0.75), torch.randn(70, 5)
    alone, both = W_dec.clone().requires_grad_(), W_dec.clone().requires_grad_()
    x_hat = sparse_decode(latents.values, latents.indices, alone, offsets=latents.offsets)
    with_window = sparse_decode(latents.values, latents.indices, both, offsets=latents.offsets)
    assert len(window.values) > 10
    with_window = with_window + sparse_decode(
        window.values, window.indices, both, offsets=window.offsets
    )
    assert torch.equal(x_hat, with_window)
    x_hat.square().sum().backward()
    with_window.square().sum().backward()
    assert torch.equal(alone.grad, both.grad)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("is_scalar", [False, True])
def test_gradients_obey_the_law(form: str, dtype, is_scalar: bool, generator) -> None:
    x, theta = (tensor.to(DEVICE) for tensor in draw(6, 50, generator, dtype))
    theta = theta[0].clone() if is_scalar else theta

    def outputs(form: str, x: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
        latents, window, l0 = select(form, x, theta, bandwidth=0.75)
        return latents.values.to(DEVICE), window.values.to(DEVICE), l0.to(DEVICE)

    exact, eager, fast = (
        outputs_and_gradients(lambda *inputs, how=how: outputs(how, *inputs), leaves)
        for how, leaves in (
            ("reference", [x.double(), theta.double()]),
            ("reference", [x, theta]),
            (form, [x, theta]),
        )
    )
    assert_obeys_law(fast, eager, exact)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_gradcheck_of_x(impl: str, generator) -> None:
    x, theta = draw(4, 9, generator, torch.float64)
    x = (x + 1 / 32).requires_grad_()  # away from every threshold

    def values(x: Tensor) -> Tensor:
        return threshold_select(x, theta, bandwidth=0.75, impl=impl).latents.values

    assert torch.autograd.gradcheck(values, [x])
    assert torch.autograd.gradcheck(lambda x: sum_of_squares(values(x)), [x])


def sum_of_squares(values: Tensor) -> Tensor:
    return values.square().sum()


@pytest.mark.parametrize("is_scalar", [False, True])
@pytest.mark.parametrize("room", [None, 4])
def test_gradients_by_hand(is_scalar: bool, room: int | None, generator) -> None:
    """jumprelu_theta_grad is autograd's; what stands at padding is ignored, NaN too."""
    x, theta = draw(12, 70, generator, torch.float64)
    theta = theta[0].clone() if is_scalar else theta
    x.requires_grad_()
    theta.requires_grad_()
    options = {} if room is None else {"capacity": 600, "window_capacity": 200}
    found = threshold_select(x, theta, bandwidth=0.75, **options)
    grads = [torch.randn(len(c.values), generator=generator).double() for c in found[:2]]
    for code, grad in zip(found[:2], grads, strict=True):
        grad[code.offsets[-1] :] = math.nan
    outputs = found.latents.values, found.window.values, found.l0
    torch.autograd.backward(outputs, [*grads, torch.tensor(0.7, dtype=torch.float64)])
    by_hand = module.jumprelu_theta_grad(found, *grads, theta, 0.75, 0.7)
    assert torch.equal(theta.grad, by_hand)
    assert theta.grad.isfinite().all()
    dense = torch.zeros(12, 70, dtype=torch.float64)
    p = int(found.latents.offsets[-1])
    tokens = tokens_of_pairs(found.latents.offsets, p)
    dense[tokens, found.latents.indices[:p]] = grads[0][:p]
    assert torch.equal(x.grad, dense)


def test_theta_has_no_gradient_without_a_bandwidth(generator) -> None:
    x, theta = draw(5, 20, generator)
    for impl in ("auto", "reference"):
        leaves = x.clone().requires_grad_(), theta.clone().requires_grad_()
        found = threshold_select(*leaves, impl=impl)
        (found.latents.values.sum() + found.l0).backward()
        assert torch.equal(leaves[0].grad, (x > theta).float())
        assert leaves[1].grad is None or not leaves[1].grad.any()
    with pytest.raises(ValueError, match="`selected` must have a window; got None"):
        module.jumprelu_theta_grad(found, found.latents.values, x, theta, 0.5)


def test_infinite_thresholds_have_finite_gradients(generator) -> None:
    x, theta = draw(5, 20, generator)
    theta[:2] = torch.tensor([math.inf, -math.inf])
    for form in FORMS:
        leaf = theta.clone().requires_grad_()
        latents, window, l0 = select(form, x, leaf, bandwidth=0.75)
        (latents.values.sum() + window.values.sum() + l0).backward()
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[:2].any()
        assert leaf.grad[2:].any()


def test_bitwise_reproducible(generator) -> None:
    x, theta = draw(200, 30, generator)
    x += torch.randn(200, 30, generator=generator) / 50

    def run() -> list[Tensor]:
        leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (x, theta)]
        latents, window, l0 = threshold_select(*leaves, bandwidth=0.75)
        (latents.values.pow(3).sum() + window.values.exp().sum() + l0).backward()
        return [*latents, *window, l0, *(leaf.grad for leaf in leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# ---- torch.compile and launchers


@ignore_dynamo_deprecation
@pytest.mark.parametrize("form", FORMS[1:])
def test_opcheck(form: str, generator) -> None:
    x, theta = (tensor.to(device_of(form)) for tensor in draw(4, 45, generator))
    with_triton = form == "triton"
    with forced(form):
        for arguments in (
            (x, theta, None, None, None, with_triton),
            (x, theta, 0.25, None, None, with_triton),
            (x, theta[0].clone(), 0.25, 150, 60, with_triton),
            (x[:0], theta, 0.25, 5, None, with_triton),
        ):
            torch.library.opcheck(module.select_pairs, arguments)
    indices = torch.tensor([3, 0, 3])
    torch.library.opcheck(module.sums_by_latent, (torch.randn(3), indices, 5))


@ignore_dynamo_deprecation
@pytest.mark.parametrize("form", FORMS[1:])
def test_compiles_with_capacities(form: str, generator) -> None:
    x, theta = (tensor.to(device_of(form)) for tensor in draw(4, 45, generator))

    def step(x: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
        options = {"bandwidth": 0.5, "capacity": 150, "window_capacity": 60}
        impl = "triton" if form == "triton" else "auto"
        latents, window, l0 = threshold_select(x, theta, impl=impl, **options)
        return latents.values, window.values, l0

    with forced("torch" if form == "torch" else ""):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        expected = outputs_and_gradients(step, [x, theta])
        for ours, theirs in zip(outputs_and_gradients(compiled, [x, theta]), expected, strict=True):
            assert torch.equal(ours, theirs)
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match="`capacity` must be at least"):
                compiled(x + 9, theta)


@needs_triton
def test_the_kernel_writes_nothing_behind_the_last_pair(generator) -> None:
    """Also when more was selected, which is an error that a GPU has not yet surfaced."""
    x, theta = (tensor.to(DEVICE) for tensor in draw(4, 45, generator))
    ((words, counts),) = module.launch_marks(x, theta - 1, None)
    ends = counts.view(-1).cumsum(0)
    values, indices = x.new_full((200,), 7), torch.full((200,), 7, device=DEVICE)
    p = int(ends[1]) - 2
    assert 0 < p < int(ends[-1]) - 10
    launch(module._unmark_kernel, (4, 1), words, ends, x, values, indices, 45, 2, p, CHUNK=32)
    expected = (x > theta - 1).nonzero(as_tuple=True)[1][:p]
    assert torch.equal(indices[:p], expected)
    assert (indices[p:] == 7).all()
    assert (values[p:] == 7).all()


@needs_triton
@pytest.mark.parametrize("bandwidth", [None, 0.1])
def test_launchers_run_on_meta_tensors(bandwidth: float | None) -> None:
    """And a row-strided x is read where it lies."""
    x = torch.empty(8191, 30_000, dtype=torch.bfloat16, device="meta")[:, :24_577]
    with record_launches() as launches:
        marks = module.launch_marks(x, torch.empty(24_577, device="meta"), bandwidth)
        ends = marks[0].counts.view(-1).cumsum(0)
        values, indices = module.launch_pairs(marks[0].words, ends, x, 777, False)
    assert len(marks) == (1 if bandwidth is None else 2)
    assert marks[0].words.shape == (8191, 769)
    assert (values.shape, values.dtype) == ((777,), torch.bfloat16)
    assert (indices.shape, indices.dtype) == ((777,), torch.int64)
    mark, unmark = launches
    assert mark.args[0] is x
    assert 30_000 in [arg for arg in mark.args if isinstance(arg, int)]
    assert unmark.args[2] is x
    assert unmark.grid == (8191, 1)
    assert module.CHUNK % mark.constants["BW"] == 0


def test_the_kernels_read_a_strided_x_where_it_lies(generator) -> None:
    x, theta = draw(6, 40, generator)
    seen = []

    def lists(x: Tensor, *_: object) -> list[Ragged]:
        seen.append(x)
        return module.cpu_lists(x, *_)

    with patch.object(module, "triton_lists", lists):
        for rows in (x[:, :30], x[:, ::2]):
            module.select_pairs(rows, theta[: rows.shape[1]], None, None, None, True)
    assert seen[0].stride() == (40, 1)
    assert seen[1].stride() == (20, 1)


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bandwidth": 0.0}, "`bandwidth` must be positive and finite; got 0.0"),
        ({"bandwidth": -1.0}, "`bandwidth` must be positive and finite; got -1.0"),
        ({"bandwidth": math.inf}, "`bandwidth` must be positive and finite; got inf"),
        ({"bandwidth": math.nan}, "`bandwidth` must be positive and finite; got nan"),
        ({"capacity": -1}, "`capacity` must be at least 0; got -1"),
        (
            {"bandwidth": 1.0, "window_capacity": -2},
            "`window_capacity` must be at least 0; got -2",
        ),
        ({"window_capacity": 3}, "`window_capacity` must come with a `bandwidth`; got .*=3"),
        ({"impl": "fast"}, "`impl` must be one of .*; got 'fast'"),
    ],
)
def test_errors_of_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        threshold_select(torch.zeros(2, 3), torch.zeros(3), **options)


def test_errors_of_tensors() -> None:
    x, theta = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(TypeError, match=r"`x` must be floating point; got torch\.int64"):
        threshold_select(x.long(), theta)
    with pytest.raises(TypeError, match=r"`theta` must be floating point; got torch\.int64"):
        threshold_select(x, theta.long())
    for rows in (x[0], x[None], x[:, :0]):
        with pytest.raises(ValueError, match=r"`x` must have shape \(n, F\) with F ≥ 1; got"):
            threshold_select(rows, theta)
    for thresholds in (theta[:2], theta[None], theta[:1]):
        with pytest.raises(ValueError, match=r"`theta` must have shape \(F=3,\) or \(\); got"):
            threshold_select(x, thresholds)
    with pytest.raises(ValueError, match=r"must share one device; got x on cpu, theta on meta"):
        threshold_select(x, theta.to("meta"))
    if HAS_TRITON:
        with pytest.raises(RuntimeError, match=r"`threshold_select` with impl='triton'.*float64"):
            threshold_select(x.double().to(DEVICE), theta.to(DEVICE), impl="triton")


def test_finiteness_is_checked_when_asked() -> None:
    x, theta = torch.zeros(2, 3), torch.zeros(3)
    x[1, 1] = math.nan
    assert not threshold_select(x, theta).latents.values.numel()
    with pytest.raises(ValueError, match="`x` must be finite; got 1 NaN or infinite of 6"):
        threshold_select(x, theta, check_finite=True)
    theta[0] = math.inf
    with pytest.raises(ValueError, match="`theta` must be finite; got 1"):
        threshold_select(x.zero_(), theta, check_finite=True)
