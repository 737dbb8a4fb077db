"""Rows on a whole dictionary: encode_topk, a step's forward and backward, and Adam."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import exact
from .checking import (
    Deviation,
    deviation,
    pair_sums,
    sample,
    sample_latents,
    selection,
    worst_of,
)
from .clocks import Call
from .floors import (
    TORCH_ADAM_BYTES,
    Term,
    adam,
    decoder_gather,
    encoder_matmul,
    gradient_gather,
    one_read,
)
from .inputs import Batch, Code, Weights
from .peers import (
    PYTORCH,
    RE_IMPLEMENTATION,
    SPARSIFY,
    dense_encode,
    dense_loss,
    fused_adam,
    sparsify_step,
)
from .rows import Backward, Contender, Prepare, Row, backward, forms, forward, op
from .shapes import Shape

STEP_TOLERANCE = 0.05  # bfloat16 chooses some latents otherwise than float64 does
ENCODER = ("W_enc", "b_enc", "b_dec")
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


class Step(NamedTuple):
    """What a step's forward and backward give."""

    losses: Tensor  # (n,)
    gradients: dict[str, Tensor | None]


def encode(impl: str, s: Batch) -> tuple[Tensor, Tensor]:
    return op("encode_topk")(s.x, s.W_enc, s.b_enc, s.b_dec, k=s.k, impl=impl)


def our_losses(impl: str, s: Batch) -> Tensor:
    values, indices = encode(impl, s)
    return op("sparse_decode_loss")(values, indices, s.W_dec, s.b_dec, s.x, impl=impl).loss


def _whole_step(losses_of: Any) -> Prepare:
    """Return the preparation of a forward and backward, taken together."""

    def prepare(s: Batch) -> Call:
        leaves = {name: getattr(s, name).detach().requires_grad_() for name in PARAMETERS}
        inputs = Batch(x=s.x, k=s.k, **leaves)

        def call() -> Step:
            with torch.enable_grad():
                losses = losses_of(inputs)
            found = torch.autograd.grad(losses.mean(), tuple(leaves.values()))
            return Step(losses.detach(), dict(zip(leaves, found, strict=True)))

        return call

    return prepare


# ---- checks


def check_encode(s: Batch, found: tuple[Tensor, Tensor]) -> Deviation:
    """The values are right at their indices, and nothing that was left out is clearly larger."""
    rows = sample(len(s.x), s.x.device)
    truth, eager = (exact.pre_acts(s, rows, dtype) for dtype in (torch.float64, s.x.dtype))
    values, indices = found[0].detach()[rows], found[1][rows]
    at_eager, at_truth = (pre.gather(1, indices).relu() for pre in (eager, truth))
    best_eager, best_truth = (pre.topk(s.k, dim=-1).values.relu() for pre in (eager, truth))
    ours = values.sort(dim=-1, descending=True).values
    distinct = bool((indices.sort(dim=-1).values.diff(dim=-1) > 0).all())
    triples = (values, at_eager, at_truth), (ours, best_eager, best_truth)
    return worst_of([selection(distinct), deviation(triples)])


def check_encode_backward(s: Batch, found: Backward) -> Deviation:
    """Compare some latents' dL/dW_enc and dL/db_enc, and dL/db_dec; dL/dvalues was the values."""
    values, indices = found.outputs
    weight, bias, b_dec = (found.gradients[name] for name in ENCODER)
    assert weight is not None
    assert bias is not None
    assert b_dec is not None
    gradient = values.detach()  # zero where ReLU cut it, as its gradient is
    latents = sample_latents(indices, s.W_enc.shape[0])
    wanted: list[tuple[Tensor, Tensor, Tensor]] = []
    for dtype in (torch.float32, torch.float64):
        centred = s.x.to(dtype) - s.b_dec.to(dtype)
        if dtype == torch.float32:
            centred = (s.x - s.b_dec).float()
        sums = pair_sums(gradient, indices, centred, latents, dtype)
        totals = torch.zeros(s.W_enc.shape[0], dtype=dtype, device=s.x.device)
        totals.index_add_(0, indices.reshape(-1), gradient.reshape(-1).to(dtype))
        if dtype == torch.float32:
            totals = totals.to(s.W_enc.dtype)
        wanted.append((*sums, exact.b_dec_grad(s.W_enc, totals, dtype)))
    ours = weight[latents], bias[latents], b_dec
    found_and_wanted = zip(ours, *wanted, strict=True)
    return deviation([(own, eager.to(own.dtype), truth) for own, eager, truth in found_and_wanted])


def check_step(s: Batch, found: Any) -> Deviation:
    """Compare some tokens' losses, and see that every parameter got a finite gradient."""
    losses, gradients = found
    rows = sample(len(s.x), s.x.device)
    values, indices = exact.pre_acts(s, rows, torch.float64).topk(s.k, dim=-1)
    here = torch.arange(len(rows), device=rows.device)
    code = Code(values.relu(), indices, s.W_dec, s.b_dec, s.x[rows], here)
    truth = (s.x[rows].double() - exact.decode(code, here, torch.float64)).square().sum(-1)
    error = float(((losses[rows].double() - truth).abs() / truth).max())
    given = gradients.values() if isinstance(gradients, dict) else gradients
    is_trained = all(g is not None and bool(torch.isfinite(g).all() & g.any()) for g in given)
    return worst_of([selection(is_trained), Deviation(error / STEP_TOLERANCE, error)])


def check_adam(s: Weights, parameters: Tensor) -> Deviation:
    """Compare the first step from zeros: −lr · g / (|g| + eps)."""
    found, g = (tensor.reshape(-1)[:4096].double() for tensor in (parameters, s.gradients))
    truth = -1e-3 * g / (g.abs() + 1e-8)
    return deviation([(found.float(), truth.float(), truth)])


# ---- rows


def _encode_work(shape: Shape, itemsize: int) -> tuple[Term, ...]:
    return encoder_matmul(shape), one_read(shape, itemsize)


def _step_work(shape: Shape, itemsize: int) -> tuple[Term, ...]:
    gathers = decoder_gather(shape, itemsize), *[gradient_gather(shape, itemsize)] * 2
    return (*_encode_work(shape, itemsize), *gathers)


def _from_values(s: Batch, outputs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - as the others
    return outputs[0], outputs[0].detach()


def _encode_back(function: Any) -> Prepare:
    return backward(function, ENCODER, _from_values)


ROWS = [
    Row(
        "encode_topk",
        "forward",
        "batch",
        (
            *forms(lambda impl: forward(partial(encode, impl))),
            Contender("F.linear, torch.topk", RE_IMPLEMENTATION, forward(dense_encode)),
        ),
        check_encode,
        _encode_work,
    ),
    Row(
        "encode_topk",
        "backward",
        "batch",
        (
            *forms(lambda impl: _encode_back(partial(encode, impl))),
            Contender("F.linear, torch.topk", RE_IMPLEMENTATION, _encode_back(dense_encode)),
        ),
        check_encode_backward,
        lambda shape, itemsize: (gradient_gather(shape, itemsize),),
    ),
    Row(
        "step",
        "forward and backward, no optimiser",
        "batch",
        (
            *forms(lambda impl: _whole_step(partial(our_losses, impl)), reference_on=()),
            Contender("dense autograd", RE_IMPLEMENTATION, _whole_step(dense_loss)),
            Contender("eai-sparsify", SPARSIFY, sparsify_step, False, devices=("cuda",)),
        ),
        check_step,
        _step_work,
    ),
    Row(
        "adam",
        "both weights, fp32",
        "weights",
        (Contender("torch.optim.Adam(fused=True)", PYTORCH, fused_adam, graph=False),),
        check_adam,
        lambda shape, itemsize: (adam(shape),),  # noqa: ARG005 - fp32 whatever the shape's dtype
        moved=lambda shape, itemsize: (adam(shape, TORCH_ADAM_BYTES),),  # noqa: ARG005
    ),
]
