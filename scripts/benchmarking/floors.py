"""The least time an op can take: bytes over measured bandwidth, FLOPs over a measured rate.

The bytes are the compulsory ones of a training step: the pre-activations are read once, each of a
token's k rows is gathered once, a gradient is never stored. An op that stores more than that is
above its floor by just that much, and docs/benchmarks/README.md says which do.

A gather from a table that fits into the L2 cache runs at the L2's rate. A weight gradient gathers
rows of n tokens, each about k times: its floor takes them from L2 at any size.
"""

from typing import Literal, NamedTuple

from .shapes import Shape

ADAM_BYTES = 26  # fp32 p, m, v read and written, a bf16 shadow written, the gradient never stored
TORCH_ADAM_BYTES = 28  # the same without the shadow, and a stored fp32 gradient read


class Ceilings(NamedTuple):
    """What this device was measured to do in this run. Bandwidths count bytes read and written."""

    copy_bytes_per_s: float
    l2_bytes_per_s: float  # equal to the copy's where there is no L2 to measure
    matmul_flop_per_s: float
    l2_bytes: int  # the size of the L2 cache


class Term(NamedTuple):
    """A part of an op's compulsory work: bytes, or FLOPs where `kind` is matmul."""

    kind: Literal["stream", "gather", "matmul"]
    amount: float
    table_bytes: float = 0  # what a gather reads from; 0 where it counts as cached


def floor_ms(work: tuple[Term, ...], ceilings: Ceilings) -> float:
    """Return the milliseconds that `work` takes at the ceilings, its terms one after the other."""
    return 1e3 * sum(term.amount / _rate(term, ceilings) for term in work)


def _rate(term: Term, ceilings: Ceilings) -> float:
    if term.kind == "matmul":
        return ceilings.matmul_flop_per_s
    is_cached = term.kind == "gather" and term.table_bytes <= ceilings.l2_bytes
    return ceilings.l2_bytes_per_s if is_cached else ceilings.copy_bytes_per_s


def total_bytes(work: tuple[Term, ...]) -> float:
    """Return the bytes of all terms."""
    return sum(term.amount for term in work if term.kind != "matmul")


def total_flops(work: tuple[Term, ...]) -> float:
    """Return the FLOPs of all terms."""
    return sum(term.amount for term in work if term.kind == "matmul")


def one_read(shape: Shape, itemsize: int) -> Term:
    """Return one pass over the pre-activations (or one write of their gradient)."""
    return Term("stream", shape.n * shape.d_sae * itemsize)


def decoder_gather(shape: Shape, itemsize: int) -> Term:
    """Return a gather of each token's k decoder rows."""
    table = shape.d_sae * shape.d * itemsize
    return Term("gather", shape.n * shape.k * shape.d * itemsize, table)


def gradient_gather(shape: Shape, itemsize: int) -> Term:
    """Return a gather of a token's row for each of its k pairs, as a weight gradient needs."""
    return Term("gather", shape.n * shape.k * shape.d * itemsize)


def encoder_matmul(shape: Shape) -> Term:
    """Return the dense encoder's FLOPs."""
    return Term("matmul", 2 * shape.n * shape.d_sae * shape.d)


def adam(shape: Shape, bytes_per_weight: int = ADAM_BYTES) -> Term:
    """Return the bytes of an Adam step on both weights."""
    return Term("stream", bytes_per_weight * n_weights(shape))


def n_weights(shape: Shape) -> int:
    """Return the number of elements of W_enc and W_dec together."""
    return 2 * shape.d_sae * shape.d
