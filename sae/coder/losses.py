"""What a coder is trained to make small. docs/maths.md derives each.

reconstruction = Σ‖x − x_hat‖² / (n · variance)
l1             = mean over tokens of Σ_j z_j ‖W_dec_j‖ / √d_in
auxk           = Σ‖residual − aux_hat‖² / Σ‖residual‖², aux_hat from the strongest dead latents

`variance` is a constant, the mean squared distance of activations from their mean on the
calibration sample: with it the reconstruction loss of a batch is the mean of its parts', however
the batch is split over micro-batches and processes.

To add one: a function here and a row in LOSSES, its name in the activations that use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import sae_kernels
from sae.coder.activations import ACTIVATIONS
from sae.coder.coder import SparseCoder
from sae.coder.latents import Latents


@dataclass(frozen=True)
class LossInputs:
    """What a loss may use, from one batch.

    Shapes: x, x_hat, residual (n, d_in); dead_indices (n_dead) int64, which may be empty.
    """

    coder: SparseCoder
    x: Tensor
    x_hat: Tensor
    residual: Tensor
    code: Latents | Tensor
    dead_indices: Tensor


def reconstruction_loss(residual: Tensor, variance: float) -> Tensor:
    """Return the mean squared error in units of the activations' variance."""
    return residual.pow(2).sum(-1).mean() / variance


def l1_loss(inputs: LossInputs) -> Tensor:
    """Return the coefficient-weighted L1 norm of the code, each latent times its decoder norm.

    Source: Anthropic, April 2024 update (decoder-norm-weighted L1); divided by √d_in so that the
    coefficient means the same at every width, inputs having mean norm √d_in.
    """
    norms = inputs.coder.W_dec.norm(dim=1)
    code = inputs.code
    if isinstance(code, Latents):
        weighted = (code.values * norms[code.indices]).sum(-1)
    else:
        weighted = code @ norms
    return inputs.coder.cfg.l1_coefficient * weighted.mean() / inputs.coder.d_in**0.5


def auxk_loss(inputs: LossInputs) -> Tensor:
    """Return the share of the residual that the strongest dead latents leave unexplained.

    Works on the compacted rows of dead latents, so its cost grows with their number only. The
    residual is a constant here: AuxK trains dead latents, not the living ones.
    Source: Gao et al. 2024, appendix A.2.
    """
    coder, dead = inputs.coder, inputs.dead_indices
    k = min(coder.cfg.k_aux or 0, dead.numel())
    if k == 0:
        return inputs.residual.new_zeros(())
    residual = inputs.residual.detach()
    pre_acts = torch.relu(
        (inputs.x - coder.b_dec.detach()) @ coder.W_enc[dead].T + coder.b_enc[dead]
    )
    values, indices = sae_kernels.topk(pre_acts, k)
    code = torch.zeros_like(pre_acts).scatter(-1, indices, values)
    error = (residual - code @ coder.W_dec[dead]).pow(2).sum()
    return coder.cfg.aux_coefficient * error / residual.pow(2).sum().clamp_min(1e-30)


LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {"l1": l1_loss, "auxk": auxk_loss}


def extra_losses(inputs: LossInputs) -> dict[str, Tensor]:
    """Return the losses that the coder's activation trains with besides reconstruction."""
    names = ACTIVATIONS[inputs.coder.cfg.activation].losses
    return {name: LOSSES[name](inputs) for name in names}
