"""fused_update_: the step of torch's own Adam, in every format of the moments, on every path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import DEVICE, Case, draw_indices, draw_ragged, needs_triton
from torch import Tensor

from sae_kernels import fused_update, segments
from sae_kernels.fused_update import (
    Code,
    Dictionary,
    RowGradients,
    adam_scalars,
    adam_step_,
)
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


def draw_more(generator, *, d_out: int = CASE.d) -> RowGradients:
    """Of latents that fire and that do not, in no order, with two rows of padding."""
    latents = torch.tensor([8, 2, CASE.d_sae, 0, CASE.d_sae + 3, 7])
    shapes = (6, CASE.d), (6, d_out), (6,)
    rows = [torch.randn(shape, generator=generator) for shape in shapes]
    for row in rows:
        row[latents >= CASE.d_sae] = 0
    return RowGradients(*(tensor.to(DEVICE) for tensor in (latents, *rows)))


def torch_adam_steps(
    start: Dictionary,
    steps: list,
    lr: float,
    *,
    more: list[RowGradients] | None = None,
    W_dec_grads: list[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights after torch.optim.Adam took `steps`, and each step's encoder term of b_dec.

    `more` has rows that each step adds; `W_dec_grads` are in place of the code's.
    """
    W_enc, W_dec, b_enc = weights = [torch.nn.Parameter(start[i].clone()) for i in range(3)]
    optimizer, terms = torch.optim.Adam(weights, lr=lr), []
    for i, (code, grad_x_hat, x) in enumerate(steps):
        W_enc.grad = dense(code, code.grad_pre_acts, x)
        W_dec.grad = W_dec_grads[i] if W_dec_grads else dense(code, code.values, grad_x_hat)
        b_enc.grad = dense(code, code.grad_pre_acts, torch.ones(len(x), 1, device=DEVICE))[:, 0]
        terms.append(-(b_enc.grad @ W_enc.detach()))
        if more:
            for latent, *rows in zip(*more[i], strict=True):
                for weight, row in zip(weights, rows, strict=True):
                    if latent < CASE.d_sae:
                        weight.grad[latent] += row
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


# On a CPU also with blocks of 3 rows, of which the last has 1.
each_path = pytest.mark.parametrize(
    ("impl", "block_rows"),
    [("auto", None), ("auto", 3), pytest.param("triton", None, marks=needs_triton)],
)


def make_blocks(monkeypatch, n_rows: int | None) -> None:
    if n_rows is not None:
        monkeypatch.setattr(fused_update, "BLOCK_BYTES", 4 * CASE.d * n_rows)


@each_path
@pytest.mark.parametrize("ragged", [False, True])
def test_rows_gradients_are_added(impl, block_rows, ragged: bool, generator, monkeypatch) -> None:
    """And b_dec's term, which the trainer adds to what AuxK gives it, has none of them."""
    make_blocks(monkeypatch, block_rows)
    dictionary = draw_dictionary(d_out=7)
    steps = [draw_step(generator, ragged=ragged, d_out=7) for _ in range(2)]
    more = [draw_more(generator, d_out=7) for _ in steps]
    expected, terms = torch_adam_steps(dictionary, steps, lr=0.02, more=more)
    for i, step in enumerate(steps):
        scalars = adam_scalars(0.02, i + 1, dictionary.W_enc.device)
        kept = [part.clone() for part in more[i]]
        term = fused_update.fused_update_(dictionary, scalars, *step, more=more[i], impl=impl)
        torch.testing.assert_close(term, terms[i], rtol=1e-4, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(more[i], kept, strict=True))
    for found, want in zip(dictionary[:3], expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@each_impl
def test_rows_gradients_may_be_16_bit(impl: str, generator) -> None:
    step, more = draw_step(generator), draw_more(generator)
    half = RowGradients(more.latents, *(part.bfloat16() for part in more[1:]))
    rounded = RowGradients(more.latents, *(part.float() for part in half[1:]))
    results = []
    for given in (half, rounded):
        dictionary = draw_dictionary()
        scalars = adam_scalars(0.02, 1, dictionary.W_enc.device)
        fused_update.fused_update_(dictionary, scalars, *step, more=given, impl=impl)
        results.append(dictionary[:3])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_gradients_may_be_none(generator) -> None:
    step, more = draw_step(generator), draw_more(generator)
    pair = [draw_dictionary() for _ in range(2)]
    for dictionary, given in zip(
        pair, (RowGradients(*(part[:0] for part in more)), None), strict=True
    ):
        scalars = adam_scalars(0.02, 1, dictionary.W_enc.device)
        fused_update.fused_update_(dictionary, scalars, *step, more=given)
    assert all(torch.equal(a, b) for a, b in zip(pair[0][:3], pair[1][:3], strict=True))


@each_path
def test_lazily_rows_gradients_make_a_latent_due(impl, block_rows, generator, monkeypatch) -> None:
    make_blocks(monkeypatch, block_rows)
    dictionary, device = draw_dictionary(), torch.device(DEVICE)
    step, more = draw_step(generator), draw_more(generator)
    fused_update.fused_update_(dictionary, adam_scalars(0.1, 1, device), *step, impl=impl)
    before = [tensor.clone() for tensor in dictionary[:3]]
    moments = dictionary.dec_moments.m.clone(), dictionary.b_enc_v.clone()
    step[0].indices[:] = step[0].indices % 5
    options = {"more": more, "lazy": True, "impl": impl}
    fused_update.fused_update_(dictionary, adam_scalars(0.1, 2, device), *step, **options)
    fired = set(step[0].indices.unique().tolist()) | {8, 7, 2, 0}
    assert not fired & {5, 6, 9}
    after = *dictionary[:3], dictionary.dec_moments.m, dictionary.b_enc_v
    for old, new in zip([*before, *moments], after, strict=True):
        changed = (old != new).view(CASE.d_sae, -1).any(1).nonzero()[:, 0].tolist()
        assert set(changed) == fired


@each_format
@pytest.mark.parametrize("lazy", [False, True])
def test_blocks_change_nothing(moment_format: str, lazy: bool, generator, monkeypatch) -> None:
    """Stochastic rounding draws a row's noise from the row's place in the matrix.

    Only torch's fused Adam, of b_enc and in float32, rounds the last elements of a block otherwise.
    """
    step, more = draw_step(generator, ragged=True), draw_more(generator)
    pair = [draw_dictionary(moment_format, shadow=torch.bfloat16) for _ in range(2)]
    for dictionary, n_rows in zip(pair, (CASE.d_sae, 3), strict=True):
        make_blocks(monkeypatch, n_rows)
        for i in range(2):
            scalars = adam_scalars(0.02, i + 1, dictionary.W_enc.device)
            options = {"more": more, "lazy": lazy, "impl": "reference"}
            fused_update.fused_update_(dictionary, scalars, *step, **options)
    whole, in_blocks = (list(tensors(dictionary)) for dictionary in pair)
    for ours, theirs in zip(in_blocks, whole, strict=True):
        if lazy or (ours.dtype != torch.float32 and moment_format != "fp32"):
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def draw_prefixes(code: Code, generator, d_out: int, ends: list[int]) -> tuple[Tensor, Tensor]:
    """grad_x_hat (n, P, d_out), and dL/dW_dec by autograd in float64 through P dense decodes."""
    errors = torch.randn(CASE.n, len(ends), d_out, generator=generator, dtype=torch.float64)
    errors = errors.to(DEVICE)
    acts = dense(code, code.values, torch.eye(CASE.n, device=DEVICE)).T.double()
    W_dec = torch.zeros(CASE.d_sae, d_out, dtype=torch.float64, device=DEVICE, requires_grad=True)
    x_hats = [acts[:, :end] @ W_dec[:end] for end in ends]
    loss = sum((x_hat * errors[:, p]).sum() for p, x_hat in enumerate(x_hats))
    (W_dec_grad,) = torch.autograd.grad(loss, W_dec)
    # A latent stands in the first prefix that holds it, and in all after that.
    reaching = torch.stack([errors[:, p:].sum(1) for p in range(len(ends))], 1)
    return reaching.float(), W_dec_grad.float()


@each_path
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("ends", [[1, 4, 5, CASE.d_sae], [CASE.d_sae]], ids=str)
def test_prefixes_are_dense_autograd(
    impl, block_rows, ragged: bool, ends: list[int], generator, monkeypatch
) -> None:
    make_blocks(monkeypatch, block_rows)
    dictionary = draw_dictionary(d_out=7)
    code, _, x = draw_step(generator, ragged=ragged, d_out=7)
    grad_x_hat, W_dec_grad = draw_prefixes(code, generator, 7, ends)
    given = {"prefixes": ends, "impl": impl}
    gradients = fused_update.sparse_gradients(code, grad_x_hat, x, CASE.d_sae, **given)
    torch.testing.assert_close(gradients.W_dec, W_dec_grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients.W_enc, dense(code, code.grad_pre_acts, x))
    step, scalars = (code, grad_x_hat, x), adam_scalars(0.02, 1, dictionary.W_enc.device)
    expected, terms = torch_adam_steps(dictionary, [step], lr=0.02, W_dec_grads=[W_dec_grad])
    term = fused_update.fused_update_(dictionary, scalars, *step, **given)
    torch.testing.assert_close(term, terms[0], rtol=1e-4, atol=1e-4)
    for found, want in zip(dictionary[:3], expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (5, 12)], ids=str)
@pytest.mark.parametrize("given_due", [False, True])
def test_adam_step_is_torchs(shape: tuple[int, ...], given_due: bool, generator) -> None:
    """For any tensor, by torch's own code on a CPU and by ours where rows may be left out."""
    weight = torch.randn(shape, generator=generator).to(DEVICE)
    parameter = torch.nn.Parameter(weight.clone())
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-5}
    optimizer, moments = torch.optim.Adam([parameter], **options), new_moments(weight)
    due = torch.ones(5, dtype=torch.bool, device=DEVICE) if given_due else None
    for i in range(4):
        grad = torch.randn(shape, generator=generator).to(DEVICE)
        parameter.grad = grad.clone()
        optimizer.step()
        scalars = adam_scalars(0.03, i + 1, weight.device, beta1=0.8, beta2=0.95, eps=1e-5)
        adam_step_(weight, grad, moments, scalars, due=due)
    torch.testing.assert_close(weight, parameter.detach())
    kept = optimizer.state[parameter]
    torch.testing.assert_close(moments.m, kept["exp_avg"])
    torch.testing.assert_close(moments.v, kept["exp_avg_sq"])


@pytest.mark.parametrize("shape", [(5,), (5, 12)], ids=str)
def test_adam_step_leaves_out_what_is_not_due(shape: tuple[int, ...], generator) -> None:
    weight, grad = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    every, some = weight.clone(), weight.clone()
    scalars, moments = adam_scalars(0.03, 1, weight.device), new_moments(weight)
    due = torch.tensor([True, False, True, False, False], device=DEVICE)
    adam_step_(every, grad, new_moments(weight), scalars, due=torch.ones_like(due))
    adam_step_(some, grad, moments, scalars, due=due)
    assert torch.equal(some[due], every[due])
    assert torch.equal(some[~due], weight[~due])
    assert (moments.m[due] != 0).all()
    assert (moments.m[~due] == 0).all()


@pytest.mark.parametrize("moment_format", ["bf16", "8bit"])
def test_adam_step_rounds_rows_by_their_place(moment_format, generator) -> None:
    weight, grad = (torch.randn(9, 8, generator=generator).to(DEVICE) for _ in range(2))
    whole, pieces = weight.clone(), weight.clone()
    of_whole, of_pieces = (new_moments(weight, moment_format) for _ in range(2))
    scalars = adam_scalars(0.03, 2, weight.device)
    adam_step_(whole, grad, of_whole, scalars)
    for rows in (slice(0, 4), slice(4, 9)):
        part = Moments(*(tensor[rows] for tensor in of_pieces))
        adam_step_(pieces[rows], grad[rows], part, scalars, row=rows.start)
    assert torch.equal(whole, pieces)
    assert all(torch.equal(a, b) for a, b in zip(of_whole, of_pieces, strict=True))


@needs_triton
@each_format
@pytest.mark.parametrize(
    ("lazy", "with_more"), [(False, False), (True, False), (True, True)], ids=str
)
def test_the_kernel_is_the_torch_form(
    moment_format: str, lazy: bool, with_more: bool, generator
) -> None:
    """Rounded moments too: both draw the same noise. (Shadows: the interpreter truncates.)"""
    pair = [draw_dictionary(moment_format, shadow=torch.bfloat16) for _ in range(2)]
    for i in range(2):
        step = draw_step(generator)
        step[0].indices[:] = step[0].indices.clamp(max=5)  # the last latents never fire
        scalars = adam_scalars(0.02, i + 1, pair[0].W_enc.device)
        more = draw_more(generator) if with_more else None
        for dictionary, impl in zip(pair, ("triton", "reference"), strict=True):
            options = {"more": more, "lazy": lazy, "impl": impl}
            fused_update.fused_update_(dictionary, scalars, *step, **options)
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


@each_path
def test_groups_are_dictionaries_of_their_own(impl, block_rows, generator, monkeypatch) -> None:
    """Two dictionaries as rows of one, with rates of their own, are each what it is alone."""
    make_blocks(monkeypatch, block_rows)
    monkeypatch.setattr(fused_update, "ROWS", 5)
    alone = [draw_dictionary(), draw_dictionary()]
    both = stacked(alone)
    for number, rates in ((1, [0.02, 0.3]), (2, [0.01, 0.2])):
        steps = [draw_step(generator) for _ in alone]
        terms = [
            fused_update.fused_update_(d, adam_scalars(lr, number, d.W_enc.device), *step)
            for d, lr, step in zip(alone, rates, steps, strict=True)
        ]
        (first, *rows), (second, *others) = steps
        code = Code(
            torch.cat([first.values, second.values]),
            torch.cat([first.indices, second.indices + CASE.d_sae]),
            torch.cat([first.grad_pre_acts, second.grad_pre_acts]),
        )
        given = [torch.cat(pair) for pair in zip(rows, others, strict=True)]
        scalars = adam_scalars(torch.tensor(rates), number, both.W_enc.device)
        term = fused_update.fused_update_(both, scalars, code, *given, impl=impl)
        torch.testing.assert_close(term, torch.stack(terms), rtol=1e-5, atol=1e-5)
    for found, want in zip(tensors(both), tensors(stacked(alone)), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def stacked(dictionaries: list[Dictionary]) -> Dictionary:
    """Return dictionaries as rows of one, copied."""
    first = dictionaries[0]
    of_all = [[d[i] for d in dictionaries] for i in range(7)]
    parts = [
        Moments(*map(torch.cat, zip(*part, strict=True)))
        if isinstance(first[i], Moments)
        else torch.cat(part)
        for i, part in enumerate(of_all)
    ]
    return Dictionary(*parts)


def test_groups_must_divide_the_rows(generator) -> None:
    dictionary = draw_dictionary()
    scalars = adam_scalars(torch.tensor([0.1, 0.2, 0.3]), 1, dictionary.W_enc.device)
    with pytest.raises(ValueError, match=r"of a multiple of 4 rows each; got \(3, 3\) for 10"):
        fused_update.fused_update_(dictionary, scalars, *draw_step(generator))


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
    with pytest.raises(
        ValueError, match=r"`grad_x_hat` must have shape \(n=9, prefixes=2, d_out=12"
    ):
        op(dictionary, scalars, code, grad_x_hat, x, prefixes=[3, 10])
    with pytest.raises(
        ValueError, match=r"`grad_x_hat` must have shape \(n=9, d_out=12\); got \(9,"
    ):
        op(dictionary, scalars, code, grad_x_hat[:, None].expand(9, 2, 12), x)
    for ends in ([], [3], [0, 10], [5, 3, 10], [3, 3, 10], [3, 11]):
        rows = grad_x_hat[:, None].expand(9, len(ends), 12)
        with pytest.raises(ValueError, match="`prefixes` must ascend from at least 1 to d_sae=10;"):
            op(dictionary, scalars, code, rows, x, prefixes=ends)
    with pytest.raises(ValueError, match="`prefixes` must ascend from at least 1 to d_sae=10; got"):
        fused_update.sparse_gradients(code, grad_x_hat, x, 10, prefixes=[3])
    more = draw_more(generator)
    wrong = {
        "latents": (more.latents[:, None], r"\(m\); got \(6, 1\)"),
        "W_enc": (more.W_enc[:5], r"\(m=6, d_in=12\); got \(5, 12\)"),
        "W_dec": (more.W_dec[:, :5], r"\(m=6, d_out=12\); got \(6, 5\)"),
        "b_enc": (more.b_enc[:5], r"\(m=6\); got \(5,\)"),
    }
    for name, (tensor, message) in wrong.items():
        with pytest.raises(ValueError, match=rf"`more.{name}` must have shape {message}"):
            op(dictionary, scalars, code, grad_x_hat, x, more=more._replace(**{name: tensor}))
    with pytest.raises(TypeError, match=r"`more\.latents` must be torch\.int64; got torch\.int32"):
        op(dictionary, scalars, code, grad_x_hat, x, more=more._replace(latents=more.latents.int()))
    with pytest.raises(ValueError, match=r"must share one device; got .*b_enc on meta"):
        op(
            dictionary,
            scalars,
            code,
            grad_x_hat,
            x,
            more=more._replace(b_enc=more.b_enc.to("meta")),
        )
    with pytest.raises(ValueError, match=r"`moment_format` must be one of .*; got 'fp8'"):
        new_moments(dictionary.W_enc, "fp8")  # type: ignore[arg-type]
