"""Where features point."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.config import DirectionsName


def draw_directions(
    kind: DirectionsName,
    n_features: int,
    d_in: int,
    *,
    steps: int,
    lr: float,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return unit rows (n_features, d_in) of a kind, drawn with a CPU generator.

    Errors: ValueError where more orthonormal ones are asked for than d_in.
    """
    drawn = torch.randn(n_features, d_in, generator=generator)
    if kind == "orthonormal":
        if n_features > d_in:
            raise ValueError(
                f"`world.directions` orthonormal needs `world.n_features` at most `world.d_in`; "
                f"got {n_features} and {d_in}. Use near_orthogonal, or raise `world.d_in`."
            )
        q, r = torch.linalg.qr(drawn.double().T)
        return (q * r.diagonal().sign()).T.float().contiguous().to(device)
    directions = torch.nn.functional.normalize(drawn, dim=1).to(device)
    if kind == "near_orthogonal":
        return spread(directions, steps=steps, lr=lr)
    return directions


def spread(directions: Tensor, *, steps: int, lr: float) -> Tensor:
    """Return unit rows after Adam steps on Σ_{i≠j} (g_i·g_j)² + n Σ_i (‖g_i‖² − 1)².

    The sum over pairs is ‖GᵀG‖² − Σ_i ‖g_i‖⁴, whose gradient needs the (d_in, d_in) Gram matrix
    alone: no (n, n) matrix of cosines is made, whatever n.
    """
    g = directions.clone()
    n = len(g)
    first, second = torch.zeros_like(g), torch.zeros_like(g)
    for step in range(1, steps + 1):
        squares = g.square().sum(1, keepdim=True)
        gradient = 4 * (g @ (g.T @ g) - squares * g + n * (squares - 1) * g)
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        corrected = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        g -= lr / (1 - 0.9**step) * first / corrected
    return torch.nn.functional.normalize(g, dim=1)


def draw_bias(d_in: int, norm: float, generator: torch.Generator) -> Tensor:
    """Return a vector (d_in) of a norm in a random direction."""
    return torch.nn.functional.normalize(torch.randn(d_in, generator=generator), dim=0) * norm


def mean_max_cosine(directions: Tensor, *, chunk: int = 1024) -> float:
    """Return the mean over features of the largest |cosine| with another feature."""
    total = 0.0
    for start in range(0, len(directions), chunk):
        rows = slice(start, min(start + chunk, len(directions)))
        cosines = (directions[rows] @ directions.T).abs()
        own = torch.arange(len(cosines), device=directions.device)
        cosines[own, own + start] = 0
        total += float(cosines.amax(1).double().sum())
    return total / len(directions)
