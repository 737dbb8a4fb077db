"""What every contender is given: tokens, a starting dictionary, and the optimiser's settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sae.coder import SparseCoder
from sae.config import CoderConfig

from .clocks import DEFAULT_L2_BYTES
from .inputs import Draw
from .shapes import Firing, Shape
from .step_shapes import n_dead_of

SEED = 0
LR = 1e-3
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Task:
    """One shape's training problem; `kind` is the device that the rows are meant for.

    xs: sets of tokens (n, d) float32 that the steps turn through. b_enc: (d_sae), which gives the
    latents their firing rates.
    """

    shape: Shape
    device: torch.device
    kind: str
    xs: list[Tensor]
    b_enc: Tensor

    @property
    def on_gpu(self) -> bool:
        """Say whether bf16 is the normal precision."""
        return self.kind == "cuda"

    @cached_property
    def rows(self) -> Tensor:
        """W_dec, and W_enc, before the first step: (d_sae, d) unit rows, in the host's memory."""
        cfg = CoderConfig(d_sae=self.shape.d_sae, k=self.shape.k)
        return SparseCoder.create(self.shape.d, cfg, seed=SEED).W_dec.detach()

    def weight(self) -> Tensor:
        """Return a fresh copy of the starting rows on the device."""
        return self.rows.to(self.device, copy=True)

    def dead(self) -> Tensor:
        """Return the latents that AuxK's row calls dead, spread over the dictionary, ascending."""
        n_dead, d_sae = n_dead_of(self.shape, self.kind), self.shape.d_sae
        return torch.arange(n_dead, device=self.device) * (d_sae // n_dead)


@dataclass(frozen=True)
class Trainee:
    """A dictionary in training.

    step: one optimiser step on tokens (n, d). loss: the last step's squared error a token; None
    where nothing is trained. kept: the parameters and the optimiser's state.
    """

    step: Callable[[Tensor], Any]
    loss: Callable[[], float] | None
    kept: Callable[[], list[Tensor]]
    standing_bytes: int = 0  # what else it holds between steps: 16-bit copies of weights


def draw_task(shape: Shape, device: torch.device, kind: str, firing: Firing) -> Task:
    """Return normal tokens, and biases such that latents fire alike or at log-normal rates."""
    generator = torch.Generator(device).manual_seed(SEED)
    draw = Draw(device, torch.float32, DEFAULT_L2_BYTES if kind == "cuda" else 0, generator)
    n_sets = draw.n_sets(4 * shape.n * shape.d)
    xs = [draw.normal(shape.n, shape.d) for _ in range(n_sets)]
    return Task(shape, device, kind, xs, _biases(draw, shape, firing))


def _biases(draw: Draw, shape: Shape, firing: Firing) -> Tensor:
    """Return (d_sae) such that a normal number plus it passes one cut at the latent's rate."""
    if firing == "uniform":
        return torch.zeros(shape.d_sae, device=draw.device)
    rates = draw.firing_rates(shape, firing).double()
    mean = torch.full_like(rates, shape.k / shape.d_sae)
    return (torch.special.ndtri(rates) - torch.special.ndtri(mean)).float()
