"""fused_update_: the step of torch's own Adam, in every format of the moments, on every path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import DEVICE, Case, draw_indices, draw_ragged, needs_triton
from torch import Tensor

from sae_kernels import fused_update, segments
from sae_kernels.fused_update import Code, Dictionary, adam_scalars
from sae_kernels.moments import Moments, new_moments, noise_of, read_moments, write_moments_

CASE = Case(n=9, d=12, d_sae=10, k=3, firing="hub")
each_impl = pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=needs_triton)])
each_format = pytest.mark.parametrize("moment_format", ["fp32", "bf16", "8bit"])


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch) -> None:
    """So that the hub of a tiny case has whole tiles."""
    monkeypatch.setattr(segments, "TILE", 4)
    monkeypatch.setattr(fused_update, "TILE", 4)
    monkeypatch.setattr(fused_update, "ROWS", 4)


def draw_dictionary(moment_format="fp32", *, d_out: int = CASE.d, shadow=None) -> Dictionary:
    generator = torch.Generator().manual_seed(1)
    W_enc = torch.randn(CASE.d_sae, CASE.d, generator=generator)
    W_dec = torch.randn(CASE.d_sae, d_out, generator=generator)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    b_enc = torch.randn(CASE.d_sae, generator=generator)
    W_enc, W_dec, b_enc = (tensor.to(DEVICE) for tensor in (W_enc, W_dec, b_enc))
    moments = new_moments(W_enc, moment_format), new_moments(W_dec, moment_format)
    zeros = torch.zeros_like(b_enc), torch.zeros_like(b_enc)
    shadows = (None, None) if shadow is None else (W_enc.to(shadow), W_dec.to(shadow))
    return Dictionary(W_enc, W_dec, b_enc, *moments, *zeros, *shadows)


def draw_step(generator, *, ragged: bool = False, d_out: int = CASE.d):
    """A code with its gradients, dL/dx_hat and x."""
    indices, offsets = draw_indices(CASE, generator), None
    if ragged:
        indices, offsets = draw_ragged(CASE, generator)
    values, grad = (torch.randn(indices.shape, generator=generator) for _ in range(2))
    if offsets is not None:
        values[offsets[-1] :] = grad[offsets[-1] :] = 0
        offsets = offsets.to(DEVICE)
    rows = [torch.randn(CASE.n, d, generator=generator).to(DEVICE) for d in (d_out, CASE.d)]
    return Code(values.to(DEVICE), indices.to(DEVICE), grad.to(DEVICE), offsets), *rows


def tensors(dictionary: Dictionary) -> Iterator[Tensor]:
    for part in dictionary:
        yield from part if isinstance(part, Moments) else [part]


def dense(code: Code, weights: Tensor, rows: Tensor) -> Tensor:
    """(d_sae, d) by a dense matrix, which shares no code with the op."""
    n = len(rows)
    matrix = torch.zeros(n, CASE.d_sae, device=DEVICE)
    for token in range(n):
        if code.offsets is None:
            mine = code.indices[token], weights[token]
        else:
            low, high = code.offsets[token], code.offsets[token + 1]
            mine = code.indices[low:high], weights[low:high]
        matrix[token].index_add_(0, *mine)
    return matrix.T @ rows


def torch_adam_steps(
    start: Dictionary, steps: list, lr: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights after torch.optim.Adam took `steps`, and each step's encoder term of b_dec."""
    W_enc, W_dec, b_enc = weights = [torch.nn.Parameter(start[i].clone()) for i in range(3)]
    optimizer, terms = torch.optim.Adam(weights, lr=lr), []
    for code, grad_x_hat, x in steps:
        W_enc.grad = dense(code, code.grad_pre_acts, x)
        W_dec.grad = dense(code, code.values, grad_x_hat)
        b_enc.grad = dense(code, code.grad_pre_acts, torch.ones(len(x), 1, device=DEVICE))[:, 0]
        terms.append(-(b_enc.grad @ W_enc.detach()))
        along = (W_dec.grad * W_dec.detach()).sum(1, keepdim=True)
        W_dec.grad -= along * W_dec.detach()
        optimizer.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    return [weight.detach() for weight in weights], terms


@each_impl
@pytest.mark.parametrize("ragged", [False, True])
def test_it_is_torchs_adam(impl: str, ragged: bool, generator) -> None:
    dictionary = draw_dictionary(d_out=7)
    steps = [draw_step(generator, ragged=ragged, d_out=7) for _ in range(3)]
    expected, terms = torch_adam_steps(dictionary, steps, lr=0.02)
    for i, step in enumerate(steps):
        scalars = adam_scalars(0.02, i + 1, dictionary.W_enc.device)
        term = fused_update.fused_update_(dictionary, scalars, *step, impl=impl)
        torch.testing.assert_close(term, terms[i], rtol=1e-4, atol=1e-4)
    for found, want in zip(dictionary[:3], expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    norms = dictionary.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


@needs_triton
@each_format
@pytest.mark.parametrize("lazy", [False, True])
def test_the_kernel_is_the_torch_form(moment_format: str, lazy: bool, generator) -> None:
    """Rounded moments too: both draw the same noise. (Shadows: the interpreter truncates.)"""
    pair = [draw_dictionary(moment_format, shadow=torch.bfloat16) for _ in range(2)]
    for i in range(2):
        step = draw_step(generator)
        step[0].indices[:] = step[0].indices.clamp(max=5)  # the last latents never fire
        scalars = adam_scalars(0.02, i + 1, pair[0].W_enc.device)
        for dictionary, impl in zip(pair, ("triton", "reference"), strict=True):
            fused_update.fused_update_(dictionary, scalars, *step, lazy=lazy, impl=impl)
    by_kernel, by_torch = (list(tensors(dictionary)) for dictionary in pair)
    for ours, theirs in zip(by_kernel[:-2], by_torch[:-2], strict=True):
        assert ours.dtype == theirs.dtype
        if ours.dtype in (torch.int8, torch.uint8):
            # A last bit of float32 may tip the rounding of an element.
            assert (ours.int() - theirs.int()).abs().max() <= 1
            assert (ours == theirs).float().mean() > 0.95
        else:
            rtol = 1e-2 if ours.itemsize == 2 else 1e-5
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-5)
    for shadow, weight in (
        (pair[0].enc_shadow, pair[0].W_enc),
        (pair[0].dec_shadow, pair[0].W_dec),
    ):
        assert shadow is not None
        torch.testing.assert_close(shadow.float(), weight, rtol=2**-7, atol=0)


@each_impl
def test_silent_latents_move_unless_lazy(impl: str) -> None:
    """Adam's momentum carries them on; lazily nothing of theirs changes."""
    moved = {}
    for lazy in (False, True):
        dictionary = draw_dictionary()
        code, grad_x_hat, x = draw_step(torch.Generator().manual_seed(3))
        device = dictionary.W_enc.device
        fused_update.fused_update_(dictionary, adam_scalars(0.1, 1, device), code, grad_x_hat, x)
        before = [tensor.clone() for tensor in tensors(dictionary) if tensor is not None]
        code.indices[:] = code.indices % 5
        options = {"lazy": lazy, "impl": impl}
        scalars = adam_scalars(0.1, 2, device)
        fused_update.fused_update_(dictionary, scalars, code, grad_x_hat, x, **options)
        after = [tensor for tensor in tensors(dictionary) if tensor is not None]
        moved[lazy] = [bool((a[5:] != b[5:]).any()) for a, b in zip(after, before, strict=True)]
    assert not any(moved[True])
    assert all(moved[False][:3])


@each_impl
@each_format
def test_dense_gradients_take_the_same_step(impl: str, moment_format: str, generator) -> None:
    one, other = (draw_dictionary(moment_format) for _ in range(2))
    code, grad_x_hat, x = draw_step(generator)
    scalars = adam_scalars(0.02, 1, one.W_enc.device)
    gradients = fused_update.sparse_gradients(code, grad_x_hat, x, CASE.d_sae, impl=impl)
    torch.testing.assert_close(gradients.W_enc, dense(code, code.grad_pre_acts, x))
    torch.testing.assert_close(gradients.W_dec, dense(code, code.values, grad_x_hat))
    a = fused_update.fused_update_(one, scalars, code, grad_x_hat, x, impl=impl)
    b = fused_update.dense_update_(other, scalars, gradients, impl=impl)
    torch.testing.assert_close(a, b)
    for ours, theirs in zip(one[:3], other[:3], strict=True):
        torch.testing.assert_close(ours, theirs)


@each_impl
def test_without_unit_norm_rows_may_grow(impl: str, generator) -> None:
    dictionary = draw_dictionary()
    scalars = adam_scalars(0.5, 1, dictionary.W_enc.device)
    step = draw_step(generator)
    fused_update.fused_update_(dictionary, scalars, *step, unit_norm=False, impl=impl)
    assert (dictionary.W_dec.norm(dim=1) - 1).abs().max() > 0.1


@each_impl
@each_format
def test_bitwise_reproducible(impl: str, moment_format: str, generator) -> None:
    step = draw_step(generator)
    runs = []
    for _ in range(2):
        dictionary = draw_dictionary(moment_format)
        scalars = adam_scalars(0.02, 3, dictionary.W_enc.device)
        fused_update.fused_update_(dictionary, scalars, *step, impl=impl)
        runs.append([tensor for tensor in tensors(dictionary) if tensor is not None])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("moment_format", ["bf16", "8bit"])
def test_rounding_is_right_on_average(moment_format: str, generator) -> None:
    """A moment that changes by 0.1% a step would stand still under rounding to nearest."""
    m = torch.randn(4, 50, generator=generator)
    v = m.square() * torch.rand(4, 50, generator=generator)
    moments, total_m, total_v = new_moments(m, moment_format), 0.0, 0.0
    n_draws = 600
    for step in range(n_draws):
        write_moments_(moments, m, v, step)
        read = read_moments(moments)
        total_m, total_v = total_m + read[0].double(), total_v + read[1].double()
    scale_m, scale_v = m.abs().amax(1, keepdim=True), v.amax(1, keepdim=True)
    assert ((total_m / n_draws - m).abs() / scale_m).max() < 2e-3
    assert ((total_v / n_draws - v).abs() / scale_v).max() < 2e-3
    one_draw = (read_moments(moments)[0] - m).abs() / scale_m
    assert one_draw.max() > 1e-3  # so the average is not trivially right


def test_a_small_v_stays_above_zero() -> None:
    m, v = torch.ones(1, 3), torch.tensor([[1.0, 1e-30, 0.0]])
    for step in range(50):
        moments = new_moments(m, "8bit")
        write_moments_(moments, m, v, step)
        read = read_moments(moments)[1]
        assert read[0, 1] > 0
        assert read[0, 2] == 0


def test_the_noise_is_uniform_and_changes_with_the_step() -> None:
    noise = torch.stack([noise_of(64, 64, step, torch.device("cpu")) for step in (1, 2)])
    for bits in (noise & 0xFFFF, noise >> 16):
        share = bits.double() / 65536
        assert abs(share.mean() - 0.5) < 0.02
        assert abs(share.std() - 12**-0.5) < 0.02
        flat = share.flatten(1)
        assert abs(torch.corrcoef(flat)[0, 1]) < 0.05
        neighbours = torch.stack([share[0, :, 1:].flatten(), share[0, :, :-1].flatten()])
        assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.05


def test_scalars_are_exact_for_the_first_steps() -> None:
    for step in (1, 2, 1000):
        scalars = adam_scalars(3e-4, torch.tensor(step), torch.device("cpu"))
        wanted = torch.tensor([3e-4, 1 - 0.9**step, 1 - 0.999**step], dtype=torch.float64)
        torch.testing.assert_close(scalars.rates.double(), wanted, rtol=1e-7, atol=0)


def test_errors(generator) -> None:
    dictionary = draw_dictionary()
    code, grad_x_hat, x = draw_step(generator)
    scalars = adam_scalars(0.1, 1, dictionary.W_enc.device)
    op = fused_update.fused_update_
    with pytest.raises(ValueError, match=r"`x` must have shape \(n=9, d_in=12\); got \(8, 12\)"):
        op(dictionary, scalars, code, grad_x_hat, x[:8])
    with pytest.raises(ValueError, match=r"`grad_x_hat` must have shape \(n=9, d_out=12\)"):
        op(dictionary, scalars, code, grad_x_hat[:, :3], x)
    with pytest.raises(ValueError, match=r"`W_dec` must be contiguous and float32, as it is upd"):
        op(dictionary._replace(W_dec=dictionary.W_dec.bfloat16()), scalars, code, grad_x_hat, x)
    with pytest.raises(ValueError, match=r"`b_enc_m` must have shape \(d_sae=10\); got \(3,\)"):
        op(dictionary._replace(b_enc_m=torch.zeros(3)), scalars, code, grad_x_hat, x)
    with pytest.raises(ValueError, match=r"`code.grad_pre_acts` and `indices` must have one shape"):
        op(dictionary, scalars, code._replace(grad_pre_acts=code.values[:, :1]), grad_x_hat, x)
    with pytest.raises(ValueError, match=r"`moment_format` must be one of .*; got 'fp8'"):
        new_moments(dictionary.W_enc, "fp8")  # type: ignore[arg-type]
