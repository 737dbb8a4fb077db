"""Rows of the ops on a sparse code: sparse_decode, sparse_decode_loss, sparse_encoder_grad."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import exact
from .checking import Deviation, deviation, pair_sums, sample, sample_latents
from .floors import Term, decoder_gather, gradient_gather
from .inputs import Code
from .peers import (
    PYTORCH,
    RE_IMPLEMENTATION,
    SPARSIFY,
    bag,
    bag_loss,
    bag_ragged,
    dense_encoder_grad,
    sparsify_decode,
)
from .rows import Backward, Contender, Row, backward, forms, forward, op
from .shapes import Shape, prefixes_of

LOSS_GOALS = {"A": 0.10, "B": 0.65, "C": 1.3}


def decode(impl: str, c: Code) -> Tensor:
    return op("sparse_decode")(c.values, c.indices, c.W_dec, c.b_dec, impl=impl)


def decode_ragged(impl: str, c: Code) -> Tensor:
    pairs = c.values.reshape(-1), c.indices.reshape(-1)
    return op("sparse_decode")(*pairs, c.W_dec, c.b_dec, offsets=c.offsets, impl=impl)


def _prefixes(c: Code, use_prefixes: bool) -> list[int] | None:
    return prefixes_of(c.W_dec.shape[0]) if use_prefixes else None


def decode_loss(use_prefixes: bool, impl: str, c: Code) -> Any:
    return op("sparse_decode_loss")(
        c.values,
        c.indices,
        c.W_dec,
        c.b_dec,
        c.target,
        prefixes=_prefixes(c, use_prefixes),
        impl=impl,
    )


def encoder_grad(impl: str, c: Code) -> tuple[Tensor, Tensor]:
    return op("sparse_encoder_grad")(c.values, c.indices, c.target, c.W_dec.shape[0], impl=impl)


# ---- checks


def check_decode(c: Code, x_hat: Tensor) -> Deviation:
    """Compare some tokens' reconstructions; a peer's x_hat has had the bias added."""
    rows = sample(len(c.values), c.values.device)
    truth = exact.decode(c, rows, torch.float64)
    return deviation([(x_hat.detach()[rows], exact.decode(c, rows, c.W_dec.dtype), truth)])


def check_decode_backward(c: Code, found: Backward) -> Deviation:
    """Compare some tokens' dL/dvalues and some latents' dL/dW_dec; dL/dx_hat was `target`."""
    rows = sample(len(c.values), c.values.device)
    values_grad, weight_grad = found.gradients["values"], found.gradients["W_dec"]
    assert values_grad is not None
    assert weight_grad is not None

    def dots(dtype: torch.dtype) -> Tensor:
        return exact.row_dots(c.W_dec, c.indices[rows], c.target[rows], dtype)

    by_token = values_grad.reshape(c.values.shape)[rows], dots(c.W_dec.dtype), dots(torch.float64)
    return deviation([by_token, *_latent_sums(c, c.values, c.target, weight_grad)])


def _latent_sums(
    c: Code, weights: Tensor, rows: Tensor, found: Tensor, totals: Tensor | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the triples of the sums over some latents' pairs, and of their totals if given."""
    latents = sample_latents(c.indices, c.W_dec.shape[0])
    truth = pair_sums(weights, c.indices, rows, latents, torch.float64)
    # Eager sums are taken in float32, and rounded once: that is what PyTorch's matmul would do.
    eager = pair_sums(weights, c.indices, rows, latents, torch.float32)
    triples = [(found[latents], eager[0].to(found.dtype), truth[0])]
    if totals is not None:
        triples.append((totals[latents], eager[1].to(totals.dtype), truth[1]))
    return triples


def check_loss(use_prefixes: bool, c: Code, found: Any) -> Deviation:
    """Compare all that the contender returns for some tokens."""
    fields = found if isinstance(found, dict) else found._asdict()
    rows = sample(len(c.values), c.values.device)
    prefixes = _prefixes(c, use_prefixes)
    truth = exact.decode_loss(c, rows, torch.float64, prefixes)
    eager = exact.decode_loss(c, rows, c.W_dec.dtype, prefixes)
    return deviation([(fields[f].detach()[rows], eager[f], truth[f]) for f in truth if f in fields])


def check_loss_backward(use_prefixes: bool, c: Code, found: Backward) -> Deviation:
    """Compare some latents' dL/dW_dec, L being the sum of all tokens' losses."""
    weight_grad = found.gradients["W_dec"]
    assert weight_grad is not None
    prefixes = _prefixes(c, use_prefixes) or [c.W_dec.shape[0]]
    latents = sample_latents(c.indices, c.W_dec.shape[0])
    sums = []
    for dtype, in_dtype in ((c.W_dec.dtype, torch.float32), (torch.float64, torch.float64)):
        total = c.target.new_zeros(len(latents), c.target.shape[1], dtype=in_dtype)
        for end, error in zip(prefixes, exact.prefix_errors(c, prefixes, dtype), strict=True):
            part = pair_sums(2 * c.values.double(), c.indices, error, latents, in_dtype)[0]
            total += part * (latents < end)[:, None]
        sums.append(total)
    return deviation([(weight_grad[latents], sums[0].to(weight_grad.dtype), sums[1])])


def check_encoder_grad(c: Code, found: tuple[Tensor, Tensor]) -> Deviation:
    """Compare some latents' dL/dW_enc and dL/db_enc."""
    return deviation(_latent_sums(c, c.values, c.target, *found))


# ---- rows


def _gather_decoder(shape: Shape, itemsize: int) -> tuple[Term, ...]:
    return (decoder_gather(shape, itemsize),)


def _gather_gradient(shape: Shape, itemsize: int) -> tuple[Term, ...]:
    return (gradient_gather(shape, itemsize),)


def _gather_both(shape: Shape, itemsize: int) -> tuple[Term, ...]:
    return decoder_gather(shape, itemsize), gradient_gather(shape, itemsize)


def _from_x_hat(c: Code, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    return x_hat, c.target


def _from_loss(c: Code, outputs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - as the others
    return outputs.loss, torch.ones_like(outputs.loss)


def _back(function: Callable[[Any], Any]) -> Any:
    return backward(function, ("values", "W_dec"), _from_x_hat)


def _with_bias(c: Code, result: Any) -> Any:
    """Add the bias, untimed, to the result of a peer that has none; a backward has none to add."""
    return result + c.b_dec if isinstance(result, Tensor) else result


def _decode_peers(direction: Any, peer: Callable[[Code], Tensor]) -> tuple[Contender, ...]:
    is_forward = direction is forward
    own = direction(sparsify_decode)
    return (
        Contender("F.embedding_bag", PYTORCH, direction(peer), is_forward, read=_with_bias),
        Contender("eai-sparsify's kernel", SPARSIFY, own, graph=False, read=_with_bias),
    )


def _rows_of_decode() -> list[Row]:
    return [
        Row(
            "sparse_decode",
            "forward",
            "code",
            (*forms(lambda impl: forward(partial(decode, impl))), *_decode_peers(forward, bag)),
            check_decode,
            _gather_decoder,
        ),
        Row(
            "sparse_decode",
            "forward, ragged",
            "code",
            (
                *forms(lambda impl: forward(partial(decode_ragged, impl))),
                _decode_peers(forward, bag_ragged)[0],
            ),
            check_decode,
            _gather_decoder,
        ),
        Row(
            "sparse_decode",
            "backward",
            "code",
            (*forms(lambda impl: _back(partial(decode, impl))), *_decode_peers(_back, bag)),
            check_decode_backward,
            _gather_both,
        ),
    ]


def _rows_of_loss(use_prefixes: bool) -> list[Row]:
    of_loss = partial(decode_loss, use_prefixes)
    suffix = ", 5 prefixes" if use_prefixes else ""
    peer = Contender("F.embedding_bag, autograd", RE_IMPLEMENTATION, forward(bag_loss), False)
    peers = () if use_prefixes else (peer,)
    # The specification decodes once a prefix: seconds that would tell nothing.
    on: dict[str, Any] = {"reference_on": ()} if use_prefixes else {}
    return [
        Row(
            "sparse_decode_loss",
            f"forward{suffix}",
            "code",
            (*forms(lambda impl: forward(partial(of_loss, impl)), **on), *peers),
            partial(check_loss, use_prefixes),
            _gather_decoder,
            goals={} if use_prefixes else LOSS_GOALS,
        ),
        Row(
            "sparse_decode_loss",
            f"backward{suffix}",
            "code",
            forms(
                lambda impl: backward(partial(of_loss, impl), ("values", "W_dec"), _from_loss), **on
            ),
            partial(check_loss_backward, use_prefixes),
            _gather_gradient,
        ),
    ]


def _rows_of_encoder_grad() -> list[Row]:
    return [
        Row(
            "sparse_encoder_grad",
            "the op is a gradient",
            "code",
            (
                *forms(lambda impl: forward(partial(encoder_grad, impl))),
                Contender("dense scatter, matmul", RE_IMPLEMENTATION, forward(dense_encoder_grad)),
            ),
            check_encoder_grad,
            _gather_gradient,
        )
    ]


ROWS = [
    *_rows_of_decode(),
    *_rows_of_loss(False),
    *_rows_of_loss(True),
    *_rows_of_encoder_grad(),
]
