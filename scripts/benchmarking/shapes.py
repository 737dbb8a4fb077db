"""The shapes that are measured, and how often each latent fires in them."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Firing = Literal["uniform", "log-normal"]
FIRINGS: tuple[Firing, ...] = ("uniform", "log-normal")


class Shape(NamedTuple):
    """n tokens of width d, a dictionary of d_sae latents, k of them firing a token."""

    name: str
    n: int
    d: int
    d_sae: int
    k: int


GPU_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("A", 8192, 768, 24_576, 32),
        Shape("B", 8192, 2048, 65_536, 64),
        Shape("C", 8192, 4096, 131_072, 64),
        Shape("D", 8192, 4096, 1_048_576, 64),
    )
}
CPU_SHAPES = {
    shape.name: shape
    for shape in (Shape("small", 1024, 576, 4608, 32), Shape("wide", 256, 576, 16_384, 32))
}


def pick_shapes(
    names: Sequence[str] | None, device_type: str, on_cpu: Mapping[str, Shape] = CPU_SHAPES
) -> list[Shape]:
    """Return the shapes of these names, all where None; ValueError for one the device has not."""
    known = GPU_SHAPES if device_type == "cuda" else on_cpu
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"`--shapes` must be among {', '.join(known)} on this device ({device_type}); "
                f"got {name!r}. Shapes A to D need a CUDA device."
            )
    return [known[name] for name in names or known]


def prefixes_of(d_sae: int) -> list[int]:
    """Return Matryoshka's 5 prefixes: d_sae halved again and again, ascending, the last d_sae."""
    return [d_sae >> step for step in reversed(range(5))]
