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
from sae.coder.latents import Latents, SparseCode, to_dense


@dataclass(frozen=True)
class LossInputs:
    """What a loss may use, from one batch.

    Shapes: x, x_hat, residual (n, d_in); dead_indices (n_dead) int64, which may be empty.
    """

    coder: SparseCoder
    x: Tensor
    x_hat: Tensor
    residual: Tensor
    code: SparseCode | Tensor
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
        weighted = to_dense(code, inputs.coder.d_sae) @ norms
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


def auxk_gradients(inputs: LossInputs) -> tuple[Tensor, sae_kernels.RowGradients | None]:
    """Return `auxk_loss` and its gradients, by hand, for the rows of dead latents alone.

    With e = residual − aux_hat: dL/daux_hat = −2 c e, c = coefficient / Σ‖residual‖². A dead index
    of d_sae is padding, which keeps a captured step's shapes: it is never chosen, its gradients
    are zero. Matmuls read the shadows where the coder has them. None where no latent is dead.
    """
    coder, dead = inputs.coder, inputs.dead_indices
    k = min(coder.cfg.k_aux or 0, dead.numel())
    if k == 0:
        return inputs.residual.new_zeros(()), None
    rows = dead.clamp(max=coder.d_sae - 1)
    W_enc = (coder.W_enc if coder.enc_shadow is None else coder.enc_shadow)[rows]
    W_dec = (coder.W_dec if coder.dec_shadow is None else coder.dec_shadow)[rows].to(W_enc.dtype)
    x = (inputs.x - coder.b_dec).to(W_enc.dtype)
    pre_acts = torch.addmm(coder.b_enc[rows].to(W_enc.dtype), x, W_enc.T)
    pre_acts = pre_acts.masked_fill_((dead >= coder.d_sae) | (pre_acts < 0), 0)
    values, indices = sae_kernels.topk(pre_acts, k)
    code = torch.zeros_like(pre_acts).scatter_(-1, indices, values)
    error = inputs.residual - code @ W_dec
    share = coder.cfg.aux_coefficient / _squared(inputs.residual).clamp_min(1e-30)
    error_rows = error.to(W_enc.dtype)
    grad_pre_acts = (error_rows @ W_dec.T).masked_fill_(code <= 0, 0)
    factor = -2 * share
    return share * _squared(error), sae_kernels.RowGradients(
        dead,
        W_enc=(grad_pre_acts.T @ x).float().mul_(factor),
        W_dec=(code.T @ error_rows).float().mul_(factor),
        b_enc=grad_pre_acts.sum(0, dtype=torch.float32).mul_(factor),
    )


def _squared(rows: Tensor) -> Tensor:
    """Return Σ‖row‖² without a matrix of squares."""
    return torch.linalg.vector_norm(rows, dim=-1).square().sum()


LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {"l1": l1_loss, "auxk": auxk_loss}


def extra_losses(inputs: LossInputs) -> dict[str, Tensor]:
    """Return the losses that the coder's activation trains with besides reconstruction."""
    names = ACTIVATIONS[inputs.coder.cfg.activation].losses
    return {name: LOSSES[name](inputs) for name in names}
