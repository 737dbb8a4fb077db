"""encode_topk: values, selection, every gradient, the memory bound, autocast."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_cases import (
    DEVICE,
    HALF,
    TRITON_CASES,
    Case,
    assert_obeys_law,
    each_case,
    each_dtype,
    ignore_dynamo_deprecation,
    needs_triton,
    outputs_and_gradients,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sae_kernels
from sae_kernels import encode


def draw(case: Case, generator: torch.Generator) -> list[Tensor]:
    """x, W_enc, b_enc, b_dec in float64; `hub` and `few` bias which latents win."""
    shapes = [(case.n, case.d), (case.d_sae, case.d), (case.d_sae,), (case.d,)]
    x, W_enc, b_enc, b_dec = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes
    )
    if case.firing == "hub":
        b_enc[0] += 40
    if case.firing == "few":
        b_enc[2 * case.k :] -= 400
    return [x, W_enc, b_enc, b_dec]


def values_in_fixed_order(x, W_enc, b_enc, b_dec=None, *, chosen: list[Tensor], **options):
    """encode_topk's values, those of the latents `chosen[0]` (set by the first call) in order.

    Rounding can swap near-equal winners, so the forms are compared on the same latents.
    """
    values, indices = sae_kernels.encode_topk(x, W_enc, b_enc, b_dec, **options)
    dense = values.new_zeros(x.shape[0], W_enc.shape[0]).scatter(1, indices, values)
    chosen.append(indices)
    return dense.gather(1, chosen[0].sort(1)[0])


@each_case
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_obeys_the_law(case: Case, dtype: torch.dtype, relu: bool, generator) -> None:
    rounded = [tensor.to(dtype) for tensor in draw(case, generator)]
    chosen: list[Tensor] = []
    op = partial(values_in_fixed_order, chosen=chosen, k=case.k, relu=relu)
    exact = outputs_and_gradients(partial(op, impl="reference"), [t.double() for t in rounded])
    eager = outputs_and_gradients(partial(op, impl="reference"), rounded)
    fast = outputs_and_gradients(partial(op, chunk_tokens=7), rounded)
    assert all(torch.equal(c.sort(1)[0], chosen[0].sort(1)[0]) for c in chosen)
    assert_obeys_law(fast, eager, exact)


@needs_triton
@pytest.mark.parametrize("case", TRITON_CASES, ids=lambda c: "-".join(map(str, c)))
def test_triton_obeys_the_law(case: Case, generator) -> None:
    rounded = [tensor.float().to(DEVICE) for tensor in draw(case, generator)]
    chosen: list[Tensor] = []
    op = partial(values_in_fixed_order, chosen=chosen, k=case.k)
    exact = outputs_and_gradients(partial(op, impl="reference"), [t.double() for t in rounded])
    eager = outputs_and_gradients(partial(op, impl="reference"), rounded)
    fast = outputs_and_gradients(partial(op, impl="triton", chunk_tokens=3), rounded)
    assert all(torch.equal(c.sort(1)[0], chosen[0].sort(1)[0]) for c in chosen)
    assert_obeys_law(fast, eager, exact)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("firing", ["few", "hub"])
def test_half_precision_obeys_the_law(dtype: torch.dtype, firing: str, generator) -> None:
    """k = every latent that can win, so that rounding cannot change the selection."""
    case = Case(n=30, d=16, d_sae=60, k=6, firing=firing)
    x, W_enc, b_enc, b_dec = draw(case, generator)
    b_enc[:] = -1000.0
    b_enc[: case.k] = 3.0
    rounded = [tensor.to(dtype) for tensor in (x, W_enc, b_enc, b_dec)]
    op = partial(values_in_fixed_order, chosen=[], k=case.k, relu=False)
    exact = outputs_and_gradients(partial(op, impl="reference"), [t.double() for t in rounded])
    eager = outputs_and_gradients(partial(op, impl="reference"), rounded)
    assert_obeys_law(outputs_and_gradients(op, rounded), eager, exact)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("n_inputs", [3, 4])
def test_gradcheck(impl, relu: bool, n_inputs: int, generator) -> None:
    inputs = draw(Case(n=4, d=3, d_sae=9, k=5), generator)[:n_inputs]
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def op(*given: Tensor) -> Tensor:
        return sae_kernels.encode_topk(*given, k=5, relu=relu, impl=impl)[0]

    assert torch.autograd.gradcheck(op, leaves)


def test_relu_stops_values_and_gradients_below_zero(generator) -> None:
    x, W_enc, b_enc, _ = draw(Case(n=6, d=4, d_sae=10, k=3), generator)
    b_enc = (b_enc - 1000).requires_grad_()
    values, _ = sae_kernels.encode_topk(x, W_enc, b_enc, k=3)
    assert (values == 0).all()
    values.sum().backward()
    assert b_enc.grad is not None
    assert (b_enc.grad == 0).all()


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(wanted: int, generator) -> None:
    """What else needs a gradient changes nothing; what needs none gets none."""
    inputs = draw(Case(n=12, d=5, d_sae=30, k=4), generator)
    op = partial(values_in_fixed_order, chosen=[], k=4)
    together = outputs_and_gradients(op, inputs)
    inputs[wanted].requires_grad_()
    weights = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).double()
    (op(*inputs) * weights).sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == [i == wanted for i in range(4)]
    torch.testing.assert_close(inputs[wanted].grad, together[1 + wanted])


@pytest.mark.parametrize("leading", [(), (2, 3), (0, 3)])
def test_leading_shapes_and_strides(leading: tuple[int, ...], generator) -> None:
    x = torch.randn(*leading, 10, generator=generator)[..., ::2]
    W_enc = torch.randn(5, 300, generator=generator).T
    values, indices = sae_kernels.encode_topk(x, W_enc, torch.zeros(300), k=4, relu=False)
    assert values.shape == indices.shape == (*leading, 4)
    pre_acts = x @ W_enc.T
    torch.testing.assert_close(pre_acts.gather(-1, indices), values)
    torch.testing.assert_close(values.sort(-1, descending=True)[0], pre_acts.topk(4)[0])


def test_indices_are_not_differentiable(generator) -> None:
    inputs = [t.requires_grad_() for t in draw(Case(n=3, d=4, d_sae=9, k=2), generator)]
    values, indices = sae_kernels.encode_topk(*inputs, k=2)
    assert values.requires_grad
    assert not indices.requires_grad


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any op returned while it was on."""

    def __init__(self, given: Tensor | None) -> None:
        super().__init__()
        self.given = given
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(found):
            if isinstance(leaf, Tensor) and not same_memory(leaf, self.given):
                self.numel = max(self.numel, leaf.numel())
        return found


def same_memory(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.untyped_storage()._cdata == other.untyped_storage()._cdata


def step(inputs: list[Tensor], W_dec: Tensor, **options) -> None:
    values, indices = sae_kernels.encode_topk(*inputs, k=4, **options)
    x_hat = sae_kernels.sparse_decode(values, indices, W_dec, impl=options.get("impl", "auto"))
    x_hat.square().sum().backward()


def largest_in_step(monkeypatch, **options) -> int:
    """Elements of the largest tensor in a training step, custom ops opened up.

    Inside a custom op the dispatch mode is off, so the launchers' Python bodies run in its place.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [t.float().requires_grad_() for t in draw(Case(256, 8, 512, 4), generator)]
    W_dec = torch.randn(512, 8, generator=generator, requires_grad=True)
    modules = [encode, sae_kernels.decode, sae_kernels.encoder_grad]
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.library.CustomOpDef):  # type: ignore[attr-defined]
                monkeypatch.setattr(module, name, value._init_fn)
    with LargestTensor(options.get("scratch")) as seen:
        step(inputs, W_dec, **options)
    return seen.numel


def test_memory_is_bounded(monkeypatch) -> None:
    n, d_sae, d, k = 256, 512, 8, 4
    assert largest_in_step(monkeypatch, impl="reference") >= n * d_sae
    # A chunk, the weights and (n, d) are smaller than (n·k, d), which must not appear either.
    weights, chunk = d_sae * d, 8 * d_sae
    assert largest_in_step(monkeypatch, chunk_tokens=8) <= max(weights, chunk)
    assert chunk < n * k * d < n * d_sae
    monkeypatch.setattr(encode, "CPU_BUFFER_BYTES", chunk * 4)
    assert largest_in_step(monkeypatch) <= max(weights, chunk)
    shadow = torch.zeros(d_sae, d, dtype=torch.bfloat16)
    assert largest_in_step(monkeypatch, shadow=shadow, chunk_tokens=8) <= max(weights, chunk)
    # Where the caller keeps the chunk, none is made.
    monkeypatch.setattr(encode, "CPU_BUFFER_BYTES", n * d_sae * 4)
    assert largest_in_step(monkeypatch) == n * d_sae
    scratch = encode.new_scratch(n, d_sae, torch.float32, torch.device("cpu"))
    assert scratch.shape == (n, d_sae)
    assert largest_in_step(monkeypatch, scratch=scratch) < n * d_sae


@pytest.mark.parametrize("chunk_tokens", [None, 3, 50])
@pytest.mark.parametrize("n_kept", [1, 7, 30, 99])
def test_scratch_changes_nothing_but_itself(n_kept: int, chunk_tokens, generator) -> None:
    inputs = [t.float() for t in draw(Case(30, 16, 400, 5), generator)]
    scratch = torch.full((n_kept, 400), torch.nan)
    given = [t.clone() for t in inputs]
    op = partial(values_in_fixed_order, chosen=[], k=5)
    expected = outputs_and_gradients(op, inputs)
    found = outputs_and_gradients(partial(op, scratch=scratch, chunk_tokens=chunk_tokens), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(inputs, given, strict=True))
    used = scratch.isfinite().all(1)
    assert used.sum() == min(n_kept, chunk_tokens or n_kept, 30)


def test_scratch_has_the_dtype_of_the_matmul(generator) -> None:
    inputs = [t.float() for t in draw(Case(30, 16, 400, 5), generator)]
    half = encode.new_scratch(30, 400, torch.bfloat16, torch.device("cpu"))
    op = partial(sae_kernels.encode_topk, *inputs, k=5)
    expected, _ = op(shadow=inputs[1].bfloat16())
    assert torch.equal(op(shadow=inputs[1].bfloat16(), scratch=half)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op(scratch=half)[0], op()[0])
    wrong = r"`scratch` must be contiguous, of at least one row and torch.float32.*new_scratch"
    for scratch in (half, half.float()[:0], torch.zeros(400, 30).T):
        with pytest.raises(ValueError, match=wrong):
            op(scratch=scratch)
    with pytest.raises(ValueError, match="`scratch` must have shape"):
        op(scratch=torch.zeros(30, 401))


def test_chunks_are_balanced_and_within_the_bound() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert encode._chunk_tokens(4096, 32_768, torch.float32, cpu) == 2048
    assert encode._chunk_tokens(8192, 131_072, torch.bfloat16, gpu) == 8192
    assert encode._chunk_tokens(10, 2**30, torch.float32, cpu) == 1
    assert encode._chunk_tokens(0, 4608, torch.float32, cpu) == 1


def test_autocast(generator) -> None:
    inputs = [t.float().requires_grad_() for t in draw(Case(20, 16, 400, 5), generator)]
    for impl in ("auto", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values, indices = sae_kernels.encode_topk(*inputs, k=5, relu=False, impl=impl)
        assert values.dtype == torch.float32
        assert torch.equal(values, values.bfloat16().float())  # the matmul ran in bfloat16
        x, W_enc, b_enc, b_dec = inputs
        exact = (x - b_dec) @ W_enc.T + b_enc
        torch.testing.assert_close(values, exact.gather(1, indices), rtol=0.02, atol=0.2)


def test_autocast_gradients_are_full_precision(generator) -> None:
    """Also when backward runs inside autocast: the sums stay float32, as without it."""
    inputs = [t.float().requires_grad_() for t in draw(Case(20, 16, 400, 5), generator)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, indices = sae_kernels.encode_topk(*inputs, k=5, relu=False)
        values.sum().backward()
    x, W_enc, _, b_dec = (tensor.detach() for tensor in inputs)
    ones = torch.ones_like(values)
    reference = sae_kernels.sparse_encoder_grad_reference
    expected_W, expected_b = reference(ones, indices, x - b_dec, 400)
    expected_x = W_enc[indices].sum(1)
    expected = [expected_x, expected_W, expected_b, -expected_x.sum(0)]
    for given, want in zip(inputs, expected, strict=True):
        assert given.grad is not None
        assert given.grad.dtype == torch.float32
        torch.testing.assert_close(given.grad, want, rtol=1e-5, atol=1e-4)


def exact_of(inputs: list[Tensor]) -> Tensor:
    x, W_enc, b_enc, b_dec = (tensor.double() for tensor in inputs)
    return (x - b_dec) @ W_enc.T + b_enc


@pytest.mark.parametrize(
    ("impl", "k"),
    [
        ("auto", 1),
        ("auto", 40),
        ("auto", 300),
        ("reference", 40),
        pytest.param("triton", 6, marks=needs_triton),
    ],
)
def test_rescored_values_are_those_of_W_enc(impl: str, k: int, generator) -> None:
    """And the selection is the exact one: with 8 candidates more, no winner was lost."""
    case = Case(n=5, d=16, d_sae=40, k=k) if impl == "triton" else Case(n=60, d=24, d_sae=300, k=k)
    inputs = [t.float().to(DEVICE) for t in draw(case, generator)]
    shadow = inputs[1].bfloat16()
    given = {"k": k, "relu": False, "impl": impl, "chunk_tokens": 7, "shadow": shadow}
    exact = exact_of(inputs)
    best = exact.topk(k)[0]
    values, indices = sae_kernels.encode_topk(*inputs, **given, rescore=True)
    assert values.dtype == torch.float32
    assert all(len(row.unique()) == k for row in indices)
    torch.testing.assert_close(values.double(), exact.gather(1, indices), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.double().sort(descending=True)[0], best, rtol=1e-5, atol=1e-5)
    if k == 40:
        _, rounded = sae_kernels.encode_topk(*inputs, **given, rescore=False)
        assert exact.gather(1, rounded).sum() < best.sum() - 1e-4  # so there was much to mend


@pytest.mark.parametrize("impl", ["auto", "reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_shadow_alone_is_the_16_bit_encode(impl: str, dtype: torch.dtype, generator) -> None:
    """It is read in W_enc's place: with a wrong W_enc nothing changes, whatever autocast says."""
    x, W_enc, b_enc, b_dec = (
        t.float().to(DEVICE) for t in draw(Case(n=5, d=16, d_sae=40, k=6), generator)
    )
    shadow = W_enc.to(dtype)
    given = [(x - b_dec).to(dtype), shadow, b_enc.to(dtype)]
    expected = sae_kernels.encode_topk(*given, k=6, impl=impl)  # type: ignore[arg-type]
    for autocast in (None, *HALF):
        with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
            options = {"k": 6, "shadow": shadow, "rescore": False, "impl": impl}
            found = sae_kernels.encode_topk(x, W_enc * 3, b_enc, b_dec, **options)
        assert found[0].dtype == torch.float32
        assert torch.equal(found[0], expected[0].float())
        assert torch.equal(found[1], expected[1])


def test_a_cpu_rescores_unless_told_otherwise(generator) -> None:
    inputs = [t.float() for t in draw(Case(20, 16, 400, 5), generator)]
    op = partial(sae_kernels.encode_topk, *inputs, k=5, shadow=inputs[1].bfloat16())
    for impl in ("auto", "reference"):
        default, rescored, rounded = (
            op(impl=impl, rescore=rescore)[0] for rescore in (None, True, False)
        )
        assert torch.equal(default, rescored)
        assert not torch.equal(default, rounded)
    assert encode._rescores(None, torch.empty(1, device="meta")) is False


@pytest.mark.parametrize(("k", "n_scored"), [(1, 9), (32, 40), (33, 41), (100, 125), (395, 400)])
def test_candidates_are_a_quarter_more(k: int, n_scored: int, generator, monkeypatch) -> None:
    assert encode.n_candidates(k, 400, rescores=True) == n_scored
    assert encode.n_candidates(k, 400, rescores=False) == 0
    inputs, seen = [t.float() for t in draw(Case(20, 16, 400, k), generator)], []

    def rescored(x, W_enc, b_enc, b_dec, candidates, *rest):
        seen.append(candidates.shape)
        return real(x, W_enc, b_enc, b_dec, candidates, *rest)

    real = encode._rescored
    monkeypatch.setattr(encode, "_rescored", rescored)
    sae_kernels.encode_topk(*inputs, k=k, shadow=inputs[1].bfloat16())
    assert seen == [(20, n_scored)]


@pytest.mark.parametrize("relu", [True, False])
def test_gradients_beside_a_shadow_are_those_of_W_enc(relu: bool, generator) -> None:
    """k = every latent that can win, so that rounding cannot change the selection."""
    case = Case(n=30, d=16, d_sae=60, k=6, firing="few")
    inputs = [t.float() for t in draw(case, generator)]
    inputs[2][6:] -= 1000
    chosen: list[Tensor] = []
    op = partial(values_in_fixed_order, chosen=chosen, k=6, relu=relu)
    expected = outputs_and_gradients(op, inputs)
    shadow = inputs[1].bfloat16()
    found = outputs_and_gradients(partial(op, shadow=shadow), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if relu:
        assert (found[0] == 0).any()
        assert (found[0] > 0).any()
    dense = partial(op, shadow=shadow, impl="reference")
    for ours, theirs in zip(outputs_and_gradients(dense, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each_dtype
def test_values_dtype_without_autocast(dtype: torch.dtype, generator) -> None:
    inputs = [t.to(dtype) for t in draw(Case(6, 4, 20, 3), generator)]
    for impl in ("auto", "reference"):
        assert sae_kernels.encode_topk(*inputs, k=3, impl=impl)[0].dtype == dtype


def test_bitwise_reproducible(generator) -> None:
    inputs = [t.float() for t in draw(Case(300, 16, 600, 6, firing="hub"), generator)]
    op = partial(values_in_fixed_order, chosen=[], k=6)
    once, again = outputs_and_gradients(op, inputs), outputs_and_gradients(op, inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("with_triton", [False, pytest.param(True, marks=needs_triton)])
def test_opcheck(with_triton: bool, generator) -> None:
    x, W_enc, b_enc, b_dec = (t.float().to(DEVICE) for t in draw(Case(5, 4, 30, 3), generator))
    half = torch.bfloat16
    for weight, bias, dtype in [
        (W_enc, b_dec, torch.float32),
        (W_enc, None, half),
        (W_enc.to(half), b_dec, half),  # a shadow
    ]:
        options = 3, True, 4, dtype, with_triton
        torch.library.opcheck(encode.encode_rows, (x, weight, b_enc, bias, *options, None))
        scratch = torch.empty(4, 30, dtype=dtype, device=DEVICE)
        torch.library.opcheck(encode.encode_rows, (x, weight, b_enc, bias, *options, scratch))


@ignore_dynamo_deprecation
def test_compiles_with_gradients(generator) -> None:
    inputs = draw(Case(9, 4, 300, 3), generator)

    def loss(x, W_enc, b_enc, b_dec) -> Tensor:
        values, indices = sae_kernels.encode_topk(x, W_enc, b_enc, b_dec, k=3, chunk_tokens=4)
        return (sae_kernels.sparse_decode(values, indices, W_enc, b_dec) - x).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(loss, inputs)
    for ours, theirs in zip(outputs_and_gradients(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@ignore_dynamo_deprecation
@pytest.mark.parametrize("rescore", [True, False])
def test_compiles_with_a_shadow(rescore: bool, generator) -> None:
    inputs = [t.float() for t in draw(Case(9, 4, 300, 3), generator)]
    shadow = inputs[1].bfloat16()
    options = {"k": 3, "chunk_tokens": 4, "shadow": shadow, "rescore": rescore}

    def loss(*given: Tensor) -> Tensor:
        return sae_kernels.encode_topk(*given, **options)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(loss, inputs)
    for ours, theirs in zip(outputs_and_gradients(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_errors() -> None:
    op, x, W, b = sae_kernels.encode_topk, torch.zeros(4, 3), torch.zeros(32, 3), torch.zeros(32)
    with pytest.raises(ValueError, match=r"`k` must be in \[1, d_sae\]; got k=64, d_sae=32"):
        op(x, W, b, k=64)
    with pytest.raises(
        ValueError, match=r"`W_enc` must have shape \(d_sae, d_in=3\); got \(3, 32\)"
    ):
        op(x, W.T, b, k=2)
    with pytest.raises(ValueError, match=r"`b_enc` must have shape \(d_sae=32\); got \(3,\)"):
        op(x, W, b[:3], k=2)
    with pytest.raises(ValueError, match=r"`b_dec` must have shape \(d_in=3\); got \(32,\)"):
        op(x, W, b, b, k=2)
    with pytest.raises(ValueError, match="`chunk_tokens` must be at least 1; got 0"):
        op(x, W, b, k=2, chunk_tokens=0)
    with pytest.raises(TypeError, match=r"`x` must be floating point; got torch\.int64"):
        op(x.long(), W, b, k=2)
    with pytest.raises(ValueError, match=r"must share one device; got .*b_enc on meta"):
        op(x, W, b.to("meta"), k=2)
    with pytest.raises(ValueError, match="`W_enc` must be finite; got 96 NaN or infinite"):
        op(x, W / 0, b, k=2, check_finite=True)
    half = W.bfloat16()
    with pytest.raises(
        ValueError, match=r"`shadow` must have shape \(d_sae=32, d_in=3\); got \(3,"
    ):
        op(x, W, b, k=2, shadow=half.T)
    with pytest.raises(TypeError, match=r"`shadow` must be torch.bfloat16 .*; got torch.float32"):
        op(x, W, b, k=2, shadow=W)
    with pytest.raises(ValueError, match=r"must share one device; got .*shadow on meta"):
        op(x, W, b, k=2, shadow=half.to("meta"))
    with pytest.raises(ValueError, match="`shadow` must be finite; got 96 NaN or infinite"):
        op(x, W, b, k=2, shadow=half / 0, check_finite=True)
    with pytest.raises(RuntimeError, match="`encode_topk` with impl='triton' must have"):
        op(x.double(), W.double(), b.double(), k=2, impl="triton")
