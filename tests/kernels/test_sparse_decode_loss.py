"""sparse_decode_loss: each output and every gradient, with and without prefixes."""

from __future__ import annotations

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
from sae_kernels import decode_loss, segments


def draw(case: Case, generator: torch.Generator, *, ragged: bool = False):
    """values, W_dec, b_dec, target in float64; and indices, and offsets of a ragged code."""
    code = {"indices": draw_indices(case, generator)}
    if ragged:
        indices, offsets = draw_ragged(case, generator)
        code = {"indices": indices, "offsets": offsets}
    shapes = [code["indices"].shape, (case.d_sae, case.d), (case.d,), (case.n, case.d)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    if ragged:
        inputs[0][code["offsets"][-1] :] = 0
    return inputs, code


def prefixes_of(case: Case) -> dict:
    """Three prefixes, the shortest of one latent, with unequal weights."""
    ends = sorted({1, case.d_sae // 3, case.d_sae})
    return {"prefixes": ends, "prefix_weights": [0.5, 2.0, 1.0][: len(ends)]}


def op(values, W_dec, b_dec, target, **options) -> sae_kernels.DecodeLoss:
    indices = options.pop("indices")
    return sae_kernels.sparse_decode_loss(values, indices, W_dec, b_dec, target, **options)


def differentiable(values, W_dec, b_dec, target, **options) -> Tensor:
    return op(values, W_dec, b_dec, target, **options).loss


def everything(inputs: list[Tensor], **options) -> list[Tensor]:
    """Each output, the loss's gradients of values, W_dec, b_dec and target last."""
    _, *gradients = outputs_and_gradients(partial(differentiable, **options), inputs)
    return [*op(*inputs, **options), *gradients]


def assert_law(inputs: list[Tensor], code: dict, dtype: torch.dtype, impl: str, **options) -> None:
    rounded = [tensor.to(DEVICE, dtype) for tensor in inputs]
    options |= {name: tensor.to(DEVICE) for name, tensor in code.items()}
    exact = everything([tensor.double() for tensor in rounded], **options, impl="reference")
    eager = everything(rounded, **options, impl="reference")
    assert_obeys_law(everything(rounded, **options, impl=impl), eager, exact)


@each_case
@each_dtype
@pytest.mark.parametrize("matryoshka", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_obeys_the_law(case: Case, dtype, matryoshka: bool, ragged: bool, generator) -> None:
    prefixes = prefixes_of(case) if matryoshka else {}
    assert_law(*draw(case, generator, ragged=ragged), dtype, "auto", **prefixes)


@needs_triton
@each_triton_case
@pytest.mark.parametrize("matryoshka", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_triton_obeys_the_law(
    case: Case, dtype, matryoshka: bool, ragged: bool, generator, monkeypatch
) -> None:
    monkeypatch.setattr(segments, "TILE", 4)
    # So that d = 133 takes several blocks.
    monkeypatch.setattr(decode_loss, "block_width", lambda *_: 32)
    prefixes = prefixes_of(case) if matryoshka else {}
    assert_law(*draw(case, generator, ragged=ragged), dtype, "triton", **prefixes)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_every_output_is_what_its_name_says(impl: str, generator) -> None:
    """Against dense matrices, which share no code with the op or its reference."""
    case = CASES[0]
    (values, W_dec, b_dec, target), code = draw(case, generator)
    ends, weights = [3, 40, case.d_sae], [0.5, 2.0, 1.0]
    dense = torch.zeros(case.n, case.d_sae, dtype=torch.float64)
    dense = dense.scatter(1, code["indices"], values).requires_grad_()
    losses, x_hats = [], []
    for end in ends:
        x_hat = dense[:, :end] @ W_dec[:end] + b_dec
        x_hats.append(x_hat)
        losses.append((x_hat - target).square().sum(1))
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    dense_grad, *x_hat_grads = torch.autograd.grad(total.sum(), [dense, *x_hats])
    given = {"prefixes": ends, "prefix_weights": weights, "impl": impl}
    found = op(values, W_dec, b_dec, target, **code, **given)
    torch.testing.assert_close(found.loss, total.detach())
    torch.testing.assert_close(found.prefix_losses, torch.stack(losses, 1).detach())
    torch.testing.assert_close(found.x_hat, x_hat.detach())
    torch.testing.assert_close(found.residual, target - x_hat.detach())
    torch.testing.assert_close(found.grad_values, dense_grad.gather(1, code["indices"]))
    # A latent that is first held by prefix p stands in that prefix and in all longer ones.
    suffixes = torch.stack([sum(x_hat_grads[p:]) for p in range(3)], 1)
    torch.testing.assert_close(-2 * found.prefix_residuals, suffixes)


@pytest.mark.parametrize("impl", ["auto", "reference", pytest.param("triton", marks=needs_triton)])
def test_one_prefix_may_have_a_weight(impl: str, generator) -> None:
    drawn, code = draw(Case(n=3, d=5, d_sae=9, k=2), generator)
    inputs = [tensor.float().to(DEVICE) for tensor in drawn]
    options = {"indices": code["indices"].to(DEVICE), "impl": impl}
    plain = everything(inputs, **options)
    weighed = everything(inputs, **options, prefixes=[9], prefix_weights=[0.25])
    names = [*sae_kernels.DecodeLoss._fields, "of values", "of W_dec", "of b_dec", "of target"]
    factors = [1.0 if name in ("x_hat", "residual", "prefix_losses") else 0.25 for name in names]
    for name, a, b, factor in zip(names, plain, weighed, factors, strict=True):
        torch.testing.assert_close(b, factor * a, msg=name)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("prefixes", [None, [2, 7]])
def test_gradcheck(impl: str, ragged: bool, prefixes, generator) -> None:
    case = Case(n=4, d=3, d_sae=7, k=2, firing="hub")
    inputs, code = draw(case, generator, ragged=ragged)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    options = {**code, "prefixes": prefixes, "impl": impl}
    assert torch.autograd.gradcheck(partial(differentiable, **options), leaves)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_only_the_loss_carries_gradients(impl: str, generator) -> None:
    inputs, code = draw(CASES[0], generator)
    found = op(*[tensor.requires_grad_() for tensor in inputs], **code, impl=impl)
    names = [name for name, tensor in found._asdict().items() if tensor.requires_grad]
    assert names == ["loss"]


def test_leading_shapes_and_strides(generator) -> None:
    case = Case(n=12, d=6, d_sae=20, k=4)
    (values, W_dec, b_dec, target), code = draw(case, generator)
    flat = op(values, W_dec, b_dec, target, **code)
    shaped = op(
        values.reshape(3, 4, 4).mT.contiguous().mT,
        W_dec.T.contiguous().T,
        b_dec,
        target.reshape(3, 4, 6),
        indices=code["indices"].reshape(3, 4, 4),
    )
    assert shaped.loss.shape == (3, 4)
    assert shaped.x_hat.shape == (3, 4, 6)
    assert shaped.prefix_losses.shape == (3, 4, 1)
    for a, b in zip(shaped, flat, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=needs_triton)])
def test_bitwise_reproducible(impl: str, generator) -> None:
    drawn, code = draw(Case(n=6, d=12, d_sae=9, k=3, firing="hub"), generator)
    inputs = [tensor.float().to(DEVICE) for tensor in drawn]
    options = {"indices": code["indices"].to(DEVICE), "prefixes": [2, 9], "impl": impl}
    once, again = (everything(inputs, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_mixed_dtypes_promote(generator) -> None:
    (values, W_dec, b_dec, target), code = draw(CASES[0], generator)
    leaves = [values.float(), W_dec.bfloat16(), b_dec.float(), target.bfloat16()]
    loss, x_hat, residual, grad_values, _, _, *gradients = everything(leaves, **code)
    assert x_hat.dtype == residual.dtype == loss.dtype == grad_values.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("with_triton", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("ends", [[9], [4, 9]])
def test_opcheck(with_triton: bool, ends: list[int], generator) -> None:
    inputs, code = draw(Case(n=3, d=6, d_sae=9, k=2), generator)
    v, w, b, y = (tensor.float().to(DEVICE) for tensor in inputs)
    given = (v, code["indices"].to(DEVICE), None, w, b, y, ends, [1.0] * len(ends), with_triton)
    torch.library.opcheck(decode_loss.decode_loss, given)


@ignore_dynamo_deprecation
def test_compiles_with_gradients(generator) -> None:
    inputs, code = draw(CASES[0], generator)
    plain = partial(differentiable, **code, prefixes=[5, CASES[0].d_sae])
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(plain, inputs)
    for ours, theirs in zip(outputs_and_gradients(compiled, inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prefixes", [[], [3], [0, 9], [5, 5, 9], [9, 5], [4, 10]])
def test_prefix_errors(prefixes: list[int]) -> None:
    given = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64), torch.ones(9, 3)
    with pytest.raises(ValueError, match="`prefixes` must ascend from at least 1 to d_sae=9; got"):
        sae_kernels.sparse_decode_loss(*given, None, torch.zeros(4, 3), prefixes=prefixes)


def test_other_errors() -> None:
    given = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64), torch.ones(9, 3), None
    op = sae_kernels.sparse_decode_loss
    with pytest.raises(ValueError, match="got 1 weights for 2 prefixes"):
        op(*given, torch.zeros(4, 3), prefixes=[2, 9], prefix_weights=[1.0])
    with pytest.raises(ValueError, match=r"`target` must have shape \(axis 0=4, d_out=3\)"):
        op(*given, torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"`target` must be floating point; got torch\.int64"):
        op(*given, torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`target` must be finite; got 12 NaN or infinite"):
        op(*given, torch.full((4, 3), torch.nan), check_finite=True)
    with pytest.raises(ValueError, match=r"`indices` must lie in \[0, d_sae\)"):
        op(given[0], given[1] + 9, *given[2:], torch.zeros(4, 3), check_indices=True)
    with pytest.raises(RuntimeError, match="`sparse_decode_loss` with impl='triton'"):
        op(
            *(t.double() if i != 1 else t for i, t in enumerate(given[:3])),
            None,
            torch.zeros(4, 3).double(),
            impl="triton",
        )
