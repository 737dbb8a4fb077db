"""sparse_decode: outputs and every gradient against the float64 reference."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from kernel_cases import (
    CASES,
    DEVICE,
    Case,
    assert_obeys_law,
    draw_indices,
    draw_ragged,
    each_case,
    each_dtype,
    each_triton_case,
    ignore_dynamo_deprecation,
    needs_triton,
    outputs_and_gradients,
)
from torch import Tensor

import sae_kernels
from sae_kernels import decode, segments


def draw(case: Case, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """values, W_dec, b_dec in float64, and indices."""
    shapes = [(case.n, case.k), (case.d_sae, case.d), (case.d,)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return inputs, draw_indices(case, generator)


def op(values, W_dec, b_dec=None, *, indices, offsets=None, impl: str = "auto") -> Tensor:
    return sae_kernels.sparse_decode(values, indices, W_dec, b_dec, offsets=offsets, impl=impl)  # type: ignore[arg-type]


def draw_ragged_code(case: Case, generator: torch.Generator) -> tuple[list[Tensor], dict]:
    """values (p,), W_dec, b_dec in float64; indices and offsets. Padding has value 0."""
    indices, offsets = draw_ragged(case, generator)
    shapes = [(len(indices),), (case.d_sae, case.d), (case.d,)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    inputs[0][offsets[-1] :] = 0
    return inputs, {"indices": indices, "offsets": offsets}


def assert_law(inputs: list[Tensor], code: dict, dtype: torch.dtype, impl: str) -> None:
    """The law for the output and the gradients of values, W_dec and b_dec."""
    rounded = [tensor.to(DEVICE, dtype) for tensor in inputs]
    code = {name: tensor.to(DEVICE) for name, tensor in code.items()}
    reference = partial(op, **code, impl="reference")
    exact = outputs_and_gradients(reference, [tensor.double() for tensor in rounded])
    eager = outputs_and_gradients(reference, rounded)
    assert_obeys_law(outputs_and_gradients(partial(op, **code, impl=impl), rounded), eager, exact)


@each_case
@each_dtype
def test_obeys_the_law(case: Case, dtype: torch.dtype, generator) -> None:
    inputs, indices = draw(case, generator)
    assert_law(inputs, {"indices": indices}, dtype, "auto")


@each_case
@each_dtype
def test_ragged_obeys_the_law(case: Case, dtype: torch.dtype, generator) -> None:
    assert_law(*draw_ragged_code(case, generator), dtype, "auto")


@needs_triton
@each_triton_case
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_triton_obeys_the_law(case, dtype, ragged, generator, monkeypatch) -> None:
    monkeypatch.setattr(segments, "TILE", 4)  # so that a hub of a tiny case has whole tiles
    if ragged:
        assert_law(*draw_ragged_code(case, generator), dtype, "triton")
    else:
        inputs, indices = draw(case, generator)
        assert_law(inputs, {"indices": indices}, dtype, "triton")


def test_ragged_is_the_dense_decode(generator) -> None:
    """Against the dense matmul, which shares no code with the op or its reference."""
    (values, W_dec, b_dec), code = draw_ragged_code(CASES[0], generator)
    dense = torch.zeros(CASES[0].n, CASES[0].d_sae, dtype=torch.float64)
    for token, (low, high) in enumerate(itertools.pairwise(code["offsets"].tolist())):
        dense[token].index_add_(0, code["indices"][low:high], values[low:high])
    for impl in ("auto", "reference"):
        torch.testing.assert_close(
            op(values, W_dec, b_dec, **code, impl=impl), dense @ W_dec + b_dec
        )


def test_ragged_padding_is_in_no_token(generator) -> None:
    """Not even when its values are rubbish."""
    inputs, code = draw_ragged_code(CASES[0], generator)
    rubbish = inputs[0].clone()
    rubbish[code["offsets"][-1] :] = 7.0
    for impl in ("auto", "reference"):
        found = outputs_and_gradients(partial(op, **code, impl=impl), [rubbish, *inputs[1:]])
        clean = outputs_and_gradients(partial(op, **code, impl=impl), inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(impl: str, with_bias: bool, generator) -> None:
    inputs, indices = draw(Case(n=5, d=3, d_sae=7, k=2, firing="hub"), generator)
    leaves = [tensor.requires_grad_() for tensor in inputs[: 3 if with_bias else 2]]
    assert torch.autograd.gradcheck(partial(op, indices=indices, impl=impl), leaves)


def test_silent_latents_get_zero_rows(generator) -> None:
    (values, W_dec, _), indices = draw(Case(n=40, d=8, d_sae=50, k=3, firing="few"), generator)
    W_dec.requires_grad_()
    op(values, W_dec, indices=indices).sum().backward()
    assert W_dec.grad is not None
    assert (W_dec.grad[6:] == 0).all()
    assert (W_dec.grad[:6] != 0).any(1).all()


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 0), (0, 3)])
def test_leading_shapes_and_strides(leading: tuple[int, ...], generator) -> None:
    values = torch.randn(*leading, 8, generator=generator)[..., ::2].requires_grad_()
    indices = torch.randint(0, 20, (*leading, 8), generator=generator)[..., ::2]
    W_dec = torch.randn(5, 20, generator=generator).T.requires_grad_()
    found = op(values, W_dec, indices=indices)
    assert found.shape == (*leading, 5)
    torch.testing.assert_close(found, op(values, W_dec, indices=indices, impl="reference"))
    found.sum().backward()  # an expanded, stride-0 gradient
    gathered = W_dec.detach()[indices].sum(-1)
    torch.testing.assert_close(values.grad, gathered)


def test_a_repeated_index_counts_twice() -> None:
    W_dec = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x_hat = op(torch.tensor([[1.0, 2.0]]), W_dec, indices=torch.tensor([[1, 1]]))
    assert x_hat.tolist() == [[9.0, 12.0]]


def test_mixed_dtypes_promote(generator) -> None:
    (values, W_dec, b_dec), indices = draw(CASES[0], generator)
    leaves = [values.float(), W_dec.bfloat16(), b_dec.float()]
    x_hat, *gradients = outputs_and_gradients(partial(op, indices=indices), leaves)
    assert x_hat.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]


def test_gradients_are_bitwise_reproducible(generator) -> None:
    inputs, indices = draw(Case(n=400, d=32, d_sae=64, k=8, firing="hub"), generator)
    leaves = [tensor.float() for tensor in inputs]
    threads = torch.get_num_threads()
    once = outputs_and_gradients(partial(op, indices=indices), leaves)
    try:
        torch.set_num_threads(1)
        again = outputs_and_gradients(partial(op, indices=indices), leaves)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("with_triton", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(with_triton: bool, ragged: bool, dtype, generator) -> None:
    if DEVICE == "cuda" and dtype == torch.bfloat16 and not with_triton:
        pytest.skip("torch's embedding_bag has no gradient in bfloat16 on a GPU")
    case = Case(n=4, d=6, d_sae=9, k=2)
    inputs, indices = draw(case, generator)
    code = {"indices": indices, "offsets": None}
    if ragged:
        inputs, code = draw_ragged_code(case, generator)
    grad = torch.randn(case.n, case.d, generator=generator)
    v, w, b, g = (tensor.to(DEVICE, dtype) for tensor in (*inputs, grad))
    pairs = tuple(None if tensor is None else tensor.to(DEVICE) for tensor in code.values())
    torch.library.opcheck(decode.decode_rows, (v, *pairs, w, b, with_triton))
    torch.library.opcheck(decode.values_grad, (g, *pairs, w, with_triton))
    torch.library.opcheck(decode.weight_grad, (v, *pairs, g, len(w), dtype, with_triton))


@ignore_dynamo_deprecation
def test_compiles_with_gradients(generator) -> None:
    inputs, indices = draw(CASES[0], generator)
    plain = partial(op, indices=indices)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(plain, inputs)
    for ours, theirs in zip(outputs_and_gradients(compiled, inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_shape_errors() -> None:
    values, indices, W_dec = (
        torch.zeros(4, 2),
        torch.zeros(4, 2, dtype=torch.int64),
        torch.ones(9, 3),
    )
    with pytest.raises(ValueError, match=r"`values` and `indices` must have one shape .*\(4, 1\)"):
        sae_kernels.sparse_decode(values[:, :1], indices, W_dec)
    with pytest.raises(ValueError, match=r"`W_dec` must have shape \(d_sae, d_out\); got \(9,\)"):
        sae_kernels.sparse_decode(values, indices, W_dec[:, 0])
    with pytest.raises(ValueError, match=r"`b_dec` must have shape \(d_out=3\); got \(9,\)"):
        sae_kernels.sparse_decode(values, indices, W_dec, torch.zeros(9))
    with pytest.raises(ValueError, match="`indices` must have at least one axis"):
        sae_kernels.sparse_decode(values[0, 0], indices[0, 0], W_dec)


def test_dtype_device_and_impl_errors() -> None:
    values, indices, W_dec = (
        torch.zeros(4, 2),
        torch.zeros(4, 2, dtype=torch.int64),
        torch.ones(9, 3),
    )
    with pytest.raises(TypeError, match=r"`indices` must be torch\.int64; got torch\.int32"):
        sae_kernels.sparse_decode(values, indices.int(), W_dec)
    with pytest.raises(TypeError, match=r"`W_dec` must be floating point; got torch\.int64"):
        sae_kernels.sparse_decode(values, indices, W_dec.long())
    with pytest.raises(ValueError, match=r"must share one device; got .*W_dec on meta"):
        sae_kernels.sparse_decode(values, indices, W_dec.to("meta"))
    values, indices, W_dec = values.double().to(DEVICE), indices.to(DEVICE), W_dec.double()
    with pytest.raises(RuntimeError, match=r"`sparse_decode` with impl='triton' .*float64 is not"):
        sae_kernels.sparse_decode(values, indices, W_dec.to(DEVICE), impl="triton")


def test_triton_without_a_gpu_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("sae_kernels.launching.INTERPRETING", False)
    code = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64), torch.ones(9, 3)
    with pytest.raises(RuntimeError, match="the tensors are on cpu, not on a CUDA device"):
        sae_kernels.sparse_decode(*code, impl="triton")
    monkeypatch.setattr("sae_kernels.launching.HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="the package `triton` is not installed"):
        sae_kernels.sparse_decode(*code, impl="triton")


def test_ragged_errors() -> None:
    values, indices, W_dec = torch.zeros(4), torch.zeros(4, dtype=torch.int64), torch.ones(9, 3)
    decode_with = partial(sae_kernels.sparse_decode, values, indices, W_dec)
    with pytest.raises(TypeError, match=r"`offsets` must be torch\.int64; got torch\.int32"):
        decode_with(offsets=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"`offsets` must have shape \(n \+ 1,\); got \(0,\)"):
        decode_with(offsets=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"With `offsets`, .* have shape \(p,\); got \(2, 2\)"):
        sae_kernels.sparse_decode(
            values.reshape(2, 2), indices.reshape(2, 2), W_dec, offsets=torch.tensor([0, 4])
        )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["values", "W_dec", "b_dec"])
def test_finiteness_is_checked_when_asked(bad: float, name: str) -> None:
    given = {"values": torch.zeros(4, 2), "W_dec": torch.ones(9, 3), "b_dec": torch.zeros(3)}
    given[name].view(-1)[1] = bad
    indices = torch.zeros(4, 2, dtype=torch.int64)
    sae_kernels.sparse_decode(**given, indices=indices)
    with pytest.raises(ValueError, match=f"`{name}` must be finite; got 1 NaN or infinite"):
        sae_kernels.sparse_decode(**given, indices=indices, check_finite=True)


@pytest.mark.parametrize("bad", [-1, 9])
def test_index_range_is_checked_when_asked(bad: int) -> None:
    values, W_dec = torch.zeros(1, 1), torch.ones(9, 3)
    indices = torch.tensor([[bad]])
    message = rf"`indices` must lie in \[0, d_sae\); got \[{bad}, {bad}\] with d_sae=9"
    with pytest.raises(ValueError, match=message):
        sae_kernels.sparse_decode(values, indices, W_dec, check_indices=True)
    sae_kernels.set_debug(True)
    try:
        with pytest.raises(ValueError, match=message):
            sae_kernels.sparse_decode(values, indices, W_dec)
    finally:
        sae_kernels.set_debug(False)
