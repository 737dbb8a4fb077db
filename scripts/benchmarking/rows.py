"""What a row is: an op in one direction, its contenders, their check and their floor."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import sae_kernels

from .checking import Deviation
from .clocks import Call
from .floors import Term
from .shapes import Shape

Prepare = Callable[[Any], Call]  # of one set of inputs
Kind = Literal["pre_acts", "code", "update", "batch", "weights"]
Work = Callable[[Shape, int], tuple[Term, ...]]  # of a shape and the bytes of an element
OURS = "ours"


class Absent(Exception):
    """A contender that this machine does not have; the message says what is missing."""


class Contender(NamedTuple):
    """One way to do a row's work."""

    name: str
    source: str  # ours, own package or re-implementation, and which
    prepare: Prepare
    graph: bool = True  # False: never try to capture it
    read: Callable[[Any, Any], Any] | None = None  # brings a result into the form of ours
    devices: tuple[str, ...] = ("cuda", "cpu")


@dataclass(frozen=True)
class Row:
    """An op in one direction, on one kind of inputs."""

    op: str
    part: str
    kind: Kind
    contenders: tuple[Contender, ...]
    check: Callable[[Any, Any], Deviation]  # of inputs and of what a call returned
    work: Work
    moved: Work | None = None  # where the contenders move other bytes than the floor's
    goals: dict[str, float] = field(default_factory=dict)  # ms on one H200, by shape


class Backward(NamedTuple):
    """What a backward call returns: the forward's outputs and the gradients of its leaves."""

    outputs: Any
    gradients: dict[str, Tensor | None]


def op(name: str) -> Callable[..., Any]:
    """Return an op of sae_kernels; raise Absent where it is not exported."""
    found = getattr(sae_kernels, name, None)
    if found is None:
        raise Absent(f"sae_kernels does not export `{name}`")
    return found


def forward(function: Callable[[Any], Any]) -> Prepare:
    """Return the preparation of a forward call, without autograd."""

    def prepare(inputs: Any) -> Call:
        def call() -> Any:
            with torch.no_grad():
                return function(inputs)

        return call

    return prepare


def backward(
    function: Callable[[Any], Any],
    leaves: tuple[str, ...],
    start: Callable[[Any, Any], tuple[Tensor, Tensor]],
) -> Prepare:
    """Return the preparation of a backward: the forward runs once, before.

    `start(inputs, outputs)` is the differentiable output and the gradient that reaches it.
    """

    def prepare(inputs: Any) -> Call:
        wanted = {name: getattr(inputs, name).detach().requires_grad_() for name in leaves}
        outputs = function(replace(inputs, **wanted))
        output, gradient = start(inputs, outputs)

        def call() -> Backward:
            found = torch.autograd.grad(
                output, tuple(wanted.values()), gradient, retain_graph=True, allow_unused=True
            )
            return Backward(outputs, dict(zip(wanted, found, strict=True)))

        return call

    return prepare


def forms(
    make: Callable[[str], Prepare], *, reference_on: tuple[str, ...] = ("cpu",)
) -> tuple[Contender, ...]:
    """Return the contenders of an op of ours: `auto`, the kernels by name, the specification."""
    return (
        Contender("auto", OURS, make("auto")),
        Contender("triton", OURS, make("triton"), devices=("cuda",)),
        Contender("reference", f"{OURS}, specification", make("reference"), devices=reference_on),
    )
