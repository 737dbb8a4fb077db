"""The least time a whole training step can take, from the measured ceilings.

The encoder's matmul, one read of the pre-activations, one gather of decoder rows, a gather for each
weight gradient, and Adam's pass over the weights, one after the other; see docs/benchmarks.
"""

from typing import Literal

from .floors import Term, adam, decoder_gather, encoder_matmul, gradient_gather, one_read
from .shapes import Shape

Precision = Literal["fp32", "bf16"]
Moments = Literal["fp32", "8bit"]
ITEMSIZE = {"fp32": 4, "bf16": 2}
# Of a weight: p in float32, m, v (and their scales) read and written; bf16 writes a shadow besides.
ADAM_BYTES: dict[tuple[Precision, Moments], int] = {
    ("fp32", "fp32"): 24,
    ("bf16", "fp32"): 26,
    ("fp32", "8bit"): 12,
    ("bf16", "8bit"): 14,
}
AUXK_MATMULS = 4  # decode the dead rows, their latents' gradient, and two weight gradients


def step_work(
    shape: Shape, precision: Precision, moments: Moments = "fp32", n_dead: int = 0
) -> tuple[Term, ...]:
    """Return the compulsory work of a step."""
    size = ITEMSIZE[precision]
    gradient = gradient_gather(shape, size)
    work = (
        encoder_matmul(shape),
        one_read(shape, size),
        decoder_gather(shape, size),
        gradient,
        gradient,
        adam(shape, ADAM_BYTES[precision, moments]),
    )
    if n_dead:
        work += (Term("matmul", AUXK_MATMULS * 2 * shape.n * n_dead * shape.d),)
    return work
