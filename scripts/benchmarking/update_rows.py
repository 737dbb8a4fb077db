"""Rows of the optimiser's step on a sparse code: the fused one, and the one by stored gradients."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checking import Deviation, deviation, pair_sums, sample_latents, selection, worst_of
from .clocks import Call
from .floors import Term, adam, gradient_gather
from .inputs import Update
from .peers import RE_IMPLEMENTATION
from .rows import Absent, Contender, Prepare, Row, forms, forward
from .shapes import Shape

GOALS = {"A": 0.50, "B": 2.8, "C": 9.0}
LR = 1e-3
BYTES = {"fp32": 26, "bf16": 18, "8bit": 14}  # a weight, with a 16-bit shadow
STORED_GRADIENT_BYTES = 4
TOLERANCE = 0.05  # of a row's change: where a gradient is nearly 0, rounding decides Adam's sign


class Stepped(NamedTuple):
    """A step's latents to check: their rows before, and the dictionary after."""

    latents: Tensor
    before: dict[str, Tensor]
    after: Any


def _ours() -> Any:
    """Return the module of the update; raise Absent without it."""
    try:
        return import_module("sae_kernels.fused_update")
    except ImportError as error:
        raise Absent(f"sae_kernels has no fused_update: {error}") from error


def _dictionary(s: Update, moment_format: str) -> Any:
    """Return the one dictionary that all sets and contenders of a format go on with."""
    if moment_format not in s.kept:
        s.kept.clear()
        new_moments = import_module("sae_kernels.moments").new_moments
        W_enc, W_dec = s.draw_weight(), s.draw_weight()
        zeros = [torch.zeros(len(W_enc), device=W_enc.device) for _ in range(3)]
        moments = new_moments(W_enc, moment_format), new_moments(W_dec, moment_format)
        shadows = W_enc.bfloat16(), W_dec.bfloat16()
        s.kept[moment_format] = _ours().Dictionary(
            W_enc, W_dec, zeros[0], *moments, *zeros[1:], *shadows
        )
    return s.kept[moment_format]


def _code(s: Update) -> Any:
    return _ours().Code(s.values, s.indices, s.grad_pre_acts)


def _stepping(moment_format: str, make: Callable[[Update, Any, Any], Call]) -> Prepare:
    """Return the preparation of a step: `make` gives it, of inputs, dictionary and scalars."""

    def prepare(s: Update) -> Call:
        dictionary = _dictionary(s, moment_format)
        step = make(s, dictionary, _ours().adam_scalars(LR, 1, s.x.device))
        latents = sample_latents(s.indices, len(dictionary.W_enc))
        before = _rows(dictionary, latents)

        def call() -> Stepped:
            step()
            return Stepped(latents, before, dictionary)

        return call

    return prepare


def _rows(dictionary: Any, latents: Tensor) -> dict[str, Tensor]:
    """Return some latents' weights and moments in float64."""
    read_moments = import_module("sae_kernels.moments").read_moments
    found = {"W_enc": dictionary.W_enc[latents], "W_dec": dictionary.W_dec[latents]}
    for side, moments in (("enc", dictionary.enc_moments), ("dec", dictionary.dec_moments)):
        rows = read_moments(type(moments)(*(tensor[latents] for tensor in moments)))
        found |= dict(zip((f"{side}_m", f"{side}_v"), rows, strict=True))
    return {name: tensor.double() for name, tensor in found.items()}


def _fused(impl: str, s: Update, dictionary: Any, scalars: Any) -> Call:
    update, code = _ours().fused_update_, _code(s)
    return lambda: update(dictionary, scalars, code, s.grad_x_hat, s.x, impl=impl)


def _by_stored_gradients(impl: str, s: Update, dictionary: Any, scalars: Any) -> Call:
    gradients = _ours().sparse_gradients(_code(s), s.grad_x_hat, s.x, len(dictionary.W_enc))
    return lambda: _ours().dense_update_(dictionary, scalars, gradients, impl=impl)


def _sparse_gradients(impl: str, s: Update) -> tuple[Tensor, ...]:
    return _ours().sparse_gradients(_code(s), s.grad_x_hat, s.x, s.d_sae, impl=impl)


def _torch_adam(s: Update, dictionary: Any, scalars: Any) -> Call:  # noqa: ARG001 - it has its own
    """Store gradients (by our sums), project, torch's Adam, renormalise, and cast the shadows."""
    W_enc, W_dec = (torch.nn.Parameter(W) for W in (dictionary.W_enc, dictionary.W_dec))
    optimizer = torch.optim.Adam([W_enc, W_dec], lr=LR, fused=True)
    for weight, moments in ((W_enc, dictionary.enc_moments), (W_dec, dictionary.dec_moments)):
        step = torch.zeros((), device=weight.device)
        optimizer.state[weight] = {"step": step, "exp_avg": moments.m, "exp_avg_sq": moments.v}
    steps = [state["step"] for state in optimizer.state.values()]
    gradients_of = _ours().sparse_gradients

    def call() -> None:
        with torch.no_grad():
            W_enc.grad, G_dec, _ = gradients_of(_code(s), s.grad_x_hat, s.x, s.d_sae)
            W_dec.grad = G_dec.sub_((G_dec * W_dec).sum(1, keepdim=True) * W_dec)
            del G_dec
            for count in steps:
                count.zero_()  # each call is a first step, as ours are
            optimizer.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
            dictionary.enc_shadow.copy_(W_enc)
            dictionary.dec_shadow.copy_(W_dec)
            optimizer.zero_grad(set_to_none=True)

    return call


# ---- checks


def check_update(s: Update, found: Stepped) -> Deviation:
    """Compare some latents' changes with Adam's in float64, and their shadows with the weights."""
    before, after, latents = found.before, found.after, found.latents
    G_enc, _ = pair_sums(s.grad_pre_acts, s.indices, s.x, latents, torch.float64)
    G_dec, _ = pair_sums(s.values, s.indices, s.grad_x_hat, latents, torch.float64)
    G_dec = G_dec - (G_dec * before["W_dec"]).sum(1, keepdim=True) * before["W_dec"]
    W_enc = before["W_enc"] - _adam_change(G_enc, before["enc_m"], before["enc_v"])
    W_dec = before["W_dec"] - _adam_change(G_dec, before["dec_m"], before["dec_v"])
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    errors = [
        (new[latents].double() - truth).norm(dim=1)
        / (truth - before[name]).norm(dim=1).clamp_min(LR)
        for name, new, truth in (("W_enc", after.W_enc, W_enc), ("W_dec", after.W_dec, W_dec))
    ]
    error = torch.cat(errors)
    shadows = (after.enc_shadow, after.W_enc), (after.dec_shadow, after.W_dec)
    same = all(_is_rounded(shadow[latents], W[latents]) for shadow, W in shadows)
    found_error = Deviation(float(error.max()) / TOLERANCE, float(error.median()))
    return worst_of([selection(same), found_error])


def _is_rounded(shadow: Tensor, weight: Tensor) -> bool:
    """Say whether a bfloat16 shadow is its weight rounded, or cut as Triton's interpreter does."""
    cut = (weight.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
    return bool(((shadow == weight.bfloat16()) | (shadow.float() == cut)).all())


def _adam_change(grad: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """Return what Adam subtracts in a first step that finds moments m and v."""
    m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad * grad
    return LR * (m / 0.1) / ((v / 0.001).sqrt() + 1e-8)


def check_gradients(s: Update, found: Any) -> Deviation:
    """Compare some latents' gradients; the sums are kept in float32."""
    latents = sample_latents(s.indices, s.d_sae)
    triples = []
    for own, weights, rows in (
        (found.W_enc, s.grad_pre_acts, s.x),
        (found.W_dec, s.values, s.grad_x_hat),
    ):
        eager, truth = (
            pair_sums(weights, s.indices, rows, latents, dtype)[0]
            for dtype in (torch.float32, torch.float64)
        )
        triples.append((own[latents], eager, truth))
    return deviation(triples)


# ---- rows


def _fused_work(bytes_per_weight: int, shape: Shape, itemsize: int) -> tuple[Term, ...]:
    gather = gradient_gather(shape, itemsize)
    return gather, gather, adam(shape, bytes_per_weight)


def _dense_work(shape: Shape, itemsize: int) -> tuple[Term, ...]:  # noqa: ARG001 - fp32 gradients
    return (adam(shape, BYTES["fp32"] + STORED_GRADIENT_BYTES),)


def _gradients_work(shape: Shape, itemsize: int) -> tuple[Term, ...]:
    return (gradient_gather(shape, itemsize),) * 2


def _update_forms(moment_format: str, make: Callable[..., Call]) -> tuple[Contender, ...]:
    # The update's "reference" is its torch form, which `auto` is on a CPU.
    found = forms(lambda impl: _stepping(moment_format, partial(make, impl)), reference_on=())
    # Rounding to narrow moments takes the torch form seconds, and is for GPUs whose memory is full.
    devices = ("cuda", "cpu") if moment_format == "fp32" else ("cuda",)
    return tuple(c._replace(devices=devices) if c.name == "auto" else c for c in found)


_PEER = Contender(
    "stored gradients, torch Adam", RE_IMPLEMENTATION, _stepping("fp32", _torch_adam), graph=False
)
ROWS = [
    *(
        Row(
            "fused_update_",
            f"both weights, {moment_format} moments",
            "update",
            (*_update_forms(moment_format, _fused), *([_PEER] if moment_format == "fp32" else [])),
            check_update,
            partial(_fused_work, n_bytes),
            goals=GOALS if moment_format == "fp32" else {},
        )
        for moment_format, n_bytes in BYTES.items()
    ),
    Row(
        "dense_update_",
        "from stored gradients, fp32 moments",
        "update",
        _update_forms("fp32", _by_stored_gradients),
        check_update,
        _dense_work,
    ),
    Row(
        "sparse_gradients",
        "both weights",
        "update",
        forms(lambda impl: forward(partial(_sparse_gradients, impl)), reference_on=()),
        check_gradients,
        _gradients_work,
    ),
]
