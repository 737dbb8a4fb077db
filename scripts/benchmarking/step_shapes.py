"""The shapes of whole training steps: the kernels' A to D on a GPU, two for a small CPU."""

from collections.abc import Sequence

from .shapes import GPU_SHAPES, Shape, pick_shapes

CPU_STEP_SHAPES = {
    shape.name: shape
    for shape in (Shape("small", 4096, 576, 4608, 32), Shape("wide", 2048, 768, 24_576, 32))
}
QUICK_SHAPE = Shape("quick", 256, 64, 1024, 8)
GROWTH_BASES = {"cuda": GPU_SHAPES["A"], "cpu": Shape("base", 1024, 256, 4096, 16)}
QUICK_GROWTH_BASE = Shape("quick base", 128, 32, 256, 4)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
AXES = ("d_sae", "k", "n")  # those that are varied, one at a time
N_DEAD = {"cuda": 8192, "cpu": 512}


def pick_step_shapes(names: Sequence[str] | None, device_type: str, quick: bool) -> list[Shape]:
    """Return the shapes of these names, all where None; ValueError for one the device has not."""
    if quick and not names:
        return [QUICK_SHAPE]
    return pick_shapes(names, device_type, CPU_STEP_SHAPES)


def n_dead_of(shape: Shape, device_type: str) -> int:
    """Return how many latents AuxK's row calls dead: at most a quarter of them."""
    return min(N_DEAD[device_type], shape.d_sae // 4)


def grown(base: Shape, axis: str) -> list[Shape]:
    """Return the base with one of its sizes varied, ascending."""
    return [
        base._replace(**{axis: size})
        for size in (int(getattr(base, axis) * factor) for factor in FACTORS)
        if size >= 1
    ]
