"""Cases that the ops' tests share, and the law they judge a fast form by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sae_kernels.launching import HAS_TRITON

HALF = (torch.float16, torch.bfloat16)
ROUNDINGS = 8


class Case(NamedTuple):
    """A sparse code of n tokens, and how its latents are drawn."""

    n: int
    d: int
    d_sae: int
    k: int
    firing: str = "uniform"


CASES = [
    Case(n=37, d=24, d_sae=96, k=8),
    Case(n=64, d=33, d_sae=700, k=5),
    Case(n=50, d=16, d_sae=64, k=4, firing="hub"),
    Case(n=40, d=16, d_sae=512, k=4, firing="few"),
    Case(n=20, d=8, d_sae=40, k=1),
    Case(n=1, d=8, d_sae=40, k=3),
    Case(n=0, d=8, d_sae=40, k=3),
    Case(n=9, d=8, d_sae=12, k=12),
]
# The interpreter takes about a millisecond a step of a loop.
TRITON_CASES = [
    Case(n=5, d=13, d_sae=16, k=5),
    Case(n=2, d=136, d_sae=12, k=9),
    Case(n=14, d=8, d_sae=6, k=3, firing="hub"),
    Case(n=5, d=8, d_sae=24, k=2, firing="few"),
    Case(n=5, d=8, d_sae=10, k=1),
    Case(n=1, d=8, d_sae=10, k=3),
    Case(n=0, d=8, d_sae=10, k=3),
    Case(n=3, d=8, d_sae=6, k=6),
]
# Triton's kernels run on a GPU where there is one, else on the CPU under its interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Every case in float32, and two of them in the 16-bit formats.
each_triton_case = pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in TRITON_CASES]
    + [(case, dtype) for case in TRITON_CASES[:2] for dtype in HALF],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, Case) else str(value)[6:],
)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

# torch 2.13's dynamo instantiates every autograd.Function that it traces, and warns of itself.
ignore_dynamo_deprecation = pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)


def draw_indices(case: Case, generator: torch.Generator) -> Tensor:
    """Distinct latents a token: all alike, one on every token, or only the first few ever."""
    weights = torch.ones(case.n, case.d_sae)
    if case.firing == "few":
        weights[:, 2 * case.k :] = 0
    if case.firing == "hub":
        weights[:, 0] = 1e6
    if not case.n:
        return torch.zeros(0, case.k, dtype=torch.int64)
    return torch.multinomial(weights, case.k, generator=generator)


def draw_ragged(case: Case, generator: torch.Generator, padding: int = 2) -> tuple[Tensor, Tensor]:
    """Indices (p,) and offsets (n + 1,): any number of pairs a token, and padding behind them."""
    counts = torch.randint(0, 2 * case.k + 1, (case.n,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    indices = torch.randint(0, case.d_sae, (int(offsets[-1]),), generator=generator)
    if case.firing == "hub":
        indices[::2] = 0
    return torch.cat([indices, indices.new_zeros(padding)]), offsets


Op = Callable[..., Tensor | tuple[Tensor, ...]]


def outputs_and_gradients(op: Op, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """The op's differentiable outputs, then the gradient of each input for one random weighting."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    found = op(*leaves)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator).to(output)
        loss = loss + (output * weights).double().sum()
    loss.backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves)
    return [output.detach() for output in outputs] + gradients


def assert_obeys_law(fast: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """Each error against float64 is at most twice the same-dtype eager error plus a tiny floor.

    The floor is one rounding of the largest number; in float32 and float64 a few, as there eager is
    exact on some machines by its order of summation, and another order, as good, is not.
    """
    assert len(fast) == len(eager) == len(exact)
    for ours, plain, truth in zip(fast, eager, exact, strict=True):
        assert ours.dtype == plain.dtype
        assert ours.shape == plain.shape == truth.shape
        if not truth.numel():
            continue
        scale = truth.abs().max().item()
        roundings = 1 if plain.dtype in HALF else ROUNDINGS
        floor = roundings * torch.finfo(plain.dtype).eps * scale + 1e-12
        allowed = 2 * (plain.double() - truth).abs().max().item() + floor
        assert (ours.double() - truth).abs().max().item() <= allowed
