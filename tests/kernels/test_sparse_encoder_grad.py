"""sparse_encoder_grad: both sums against the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_cases import (
    CASES,
    DEVICE,
    TRITON_CASES,
    Case,
    assert_obeys_law,
    draw_indices,
    draw_ragged,
    each_case,
    each_dtype,
    each_triton_case,
    needs_triton,
)
from torch import Tensor

import sae_kernels
from sae_kernels import encoder_grad, segments


def draw(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    grad_values = torch.randn(case.n, case.k, generator=generator)
    x = torch.randn(case.n, case.d, generator=generator)
    return grad_values, draw_indices(case, generator), x, case.d_sae


def assert_law(grad_values, indices, x, d_sae, dtype, impl: str, offsets=None) -> None:
    op = partial(sae_kernels.sparse_encoder_grad, d_sae=d_sae)
    code = {
        "indices": indices.to(DEVICE),
        "offsets": None if offsets is None else offsets.to(DEVICE),
    }
    grad_values, x = grad_values.to(DEVICE, dtype), x.to(DEVICE, dtype)
    exact = op(grad_values.double(), x=x.double(), **code, impl="reference")
    eager = op(grad_values, x=x, **code, impl="reference")
    assert_obeys_law(list(op(grad_values, x=x, **code, impl=impl)), list(eager), list(exact))


@each_case
@each_dtype
def test_obeys_the_law(case: Case, dtype: torch.dtype, generator) -> None:
    assert_law(*draw(case, generator), dtype, "auto")


@needs_triton
@each_triton_case
def test_triton_obeys_the_law(case: Case, dtype, generator, monkeypatch) -> None:
    monkeypatch.setattr(segments, "TILE", 4)  # so that a hub of a tiny case has whole tiles
    assert_law(*draw(case, generator), dtype, "triton")


@pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("case", TRITON_CASES[:4], ids=lambda c: c.firing)
def test_ragged_obeys_the_law(case: Case, impl: str, generator, monkeypatch) -> None:
    monkeypatch.setattr(segments, "TILE", 4)
    indices, offsets = draw_ragged(case, generator, padding=9)  # more than a tile of padding
    grad_values = torch.randn(indices.shape, generator=generator)
    x = torch.randn(case.n, case.d, generator=generator)
    assert_law(grad_values, indices, x, case.d_sae, torch.float32, impl, offsets)


def test_reference_is_the_encoders_gradient(generator) -> None:
    """Against autograd through the dense encoder, whose gradient this op replaces."""
    grad_values, indices, x, d_sae = draw(CASES[0], generator)
    W_enc = torch.randn(d_sae, x.shape[1], generator=generator, requires_grad=True)
    b_enc = torch.zeros(d_sae, requires_grad=True)
    (x @ W_enc.T + b_enc).gather(1, indices).backward(grad_values)
    for impl in ("auto", "reference"):
        found = sae_kernels.sparse_encoder_grad(grad_values, indices, x, d_sae, impl=impl)
        torch.testing.assert_close(found[0], W_enc.grad)
        torch.testing.assert_close(found[1], b_enc.grad)


def test_reference_gradcheck(generator) -> None:
    grad_values, indices, x, d_sae = draw(Case(n=4, d=3, d_sae=6, k=2), generator)
    leaves = [tensor.double().requires_grad_() for tensor in (grad_values, x)]
    reference = sae_kernels.sparse_encoder_grad_reference
    assert torch.autograd.gradcheck(lambda g, x: reference(g, indices, x, d_sae), leaves)


def test_leading_shapes_and_strides(generator) -> None:
    grad_values, indices, x, d_sae = draw(Case(n=12, d=6, d_sae=20, k=4), generator)
    expected = sae_kernels.sparse_encoder_grad(grad_values[:, ::2], indices[:, ::2], x, d_sae)
    found = sae_kernels.sparse_encoder_grad(
        grad_values[:, ::2].reshape(3, 4, 2),
        indices[:, ::2].reshape(3, 4, 2),
        x.reshape(3, 4, 6).mT.contiguous().mT,
        d_sae,
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_bitwise_reproducible(generator) -> None:
    drawn = draw(Case(n=400, d=32, d_sae=64, k=8, firing="hub"), generator)
    once, again = (sae_kernels.sparse_encoder_grad(*drawn) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])


def test_opcheck_and_compile(generator) -> None:
    drawn = draw(CASES[0], generator)
    grad_values, indices, x, d_sae = drawn
    options = d_sae, torch.float32, False
    torch.library.opcheck(encoder_grad.encoder_grad_rows, (grad_values, indices, None, x, *options))
    op = sae_kernels.sparse_encoder_grad
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*drawn), op(*drawn), strict=True):
        assert torch.equal(ours, theirs)


def test_it_refuses_a_second_derivative(generator) -> None:
    grad_values, indices, x, d_sae = draw(CASES[0], generator)
    sums, _ = sae_kernels.sparse_encoder_grad(grad_values, indices, x.requires_grad_(), d_sae)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        sums.sum().backward()


def test_errors() -> None:
    grad_values, indices = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    op, x = sae_kernels.sparse_encoder_grad, torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"`grad_values` and `indices` must have one shape"):
        op(grad_values[:3], indices, x, 9)
    with pytest.raises(ValueError, match=r"`x` must have shape \(axis 0=4, d_in\); got \(3, 3\)"):
        op(grad_values, indices, x[:3], 9)
    with pytest.raises(ValueError, match="`d_sae` must be at least 1; got 0"):
        op(grad_values, indices, x, 0)
    with pytest.raises(TypeError, match="`x` must be floating point"):
        op(grad_values, indices, x.long(), 9)
    with pytest.raises(ValueError, match=r"must lie in \[0, d_sae\); got \[0, 0\]|\[5, 5\]"):
        op(grad_values, indices + 5, x, 5, check_indices=True)
    with pytest.raises(ValueError, match=r"must share one device; got .*x on meta"):
        op(grad_values, indices, x.to("meta"), 9)
    with pytest.raises(RuntimeError, match="`sparse_encoder_grad` with impl='triton' must have"):
        op(grad_values.double(), indices, x.double(), 9, impl="triton")
