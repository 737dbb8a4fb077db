"""What a coder is trained to make small. docs/maths.md derives each.

reconstruction  see `reconstruction.py`
sparsity        see `sparsity.py`
gate          = Σ‖x − gate_hat‖² / (n · variance), gate_hat from the open gates' own strength
auxk          = Σ‖residual − aux_hat‖² / Σ‖residual‖², aux_hat from the strongest dead latents
dead_penalty    see `dead_penalty.py`

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
from sae.coder.dead_penalty import pre_act_loss
from sae.coder.latents import Latents, SparseCode
from sae.coder.pre_acts import pre_activations_of
from sae.coder.sparsity import sparsity_loss
from sae.coder.step_values import StepValues
from sae.config import CoderConfig


@dataclass(frozen=True)
class LossInputs:
    """What a loss may use, from one batch.

    Shapes: x (n, d_in), what was read; target, residual (n, d_out), what the code was to write, and
    what it left over; pre_acts (n, d_sae), None where the code was made without
    them; dead_indices (n_dead) int64, which may be empty, and where d_sae is padding. wider: the
    code of `coder.multi_k` latents. variance: see `reconstruction`.
    """

    coder: SparseCoder
    x: Tensor
    target: Tensor
    residual: Tensor
    code: SparseCode | Tensor
    dead_indices: Tensor
    values: StepValues
    pre_acts: Tensor | None = None
    wider: Latents | None = None
    variance: float = 1.0


def code_sparsity_loss(inputs: LossInputs) -> Tensor:
    """Return the sparsity loss that the configuration names, with the weight it has now."""
    return sparsity_loss(inputs.coder, _pre_acts(inputs), inputs.code, inputs.values)


def gate_loss(inputs: LossInputs) -> Tensor:
    """Return the error of a reconstruction from the gates' pre-activations, the decoder held still.

    It is what trains a gate to open where the latent is needed.
    Source: Rajamanoharan et al. 2024a (arXiv 2404.16014), eq. 8, the last term.
    """
    coder = inputs.coder
    gates = torch.relu(_pre_acts(inputs))
    gate_hat = coder.decode(gates, is_held=True)
    return (inputs.target - gate_hat).pow(2).sum(-1).mean() / inputs.variance


def multi_topk_loss(inputs: LossInputs) -> Tensor:
    """Return the error of the wider code's reconstruction, which trains latents beyond the k-th.

    Source: Gao et al. 2024 (arXiv 2406.04093), §4.1 (Multi-TopK).
    """
    assert inputs.wider is not None, "the coder encodes `multi_k` latents"
    errors = (inputs.target - inputs.coder.decode(inputs.wider)).pow(2).sum(-1)
    return inputs.coder.cfg.multi_k_coefficient * errors.mean() / inputs.variance


def _pre_acts(inputs: LossInputs) -> Tensor:
    assert inputs.pre_acts is not None, "dense activations keep their pre-activations"
    return inputs.pre_acts


def auxk_loss(inputs: LossInputs) -> Tensor:
    """Return the share of the residual that the strongest dead latents leave unexplained.

    Works on the compacted rows of dead latents, so its cost grows with their number only. The
    residual is a constant here: AuxK trains dead latents, not the living ones. A dead index of
    d_sae is padding, which keeps a captured step's shapes, and changes nothing.
    Source: Gao et al. 2024, appendix A.2.
    """
    coder, dead = inputs.coder, inputs.dead_indices
    k = min(coder.cfg.k_aux or 0, dead.numel())
    if k == 0:
        return inputs.residual.new_zeros(())
    residual, rows = inputs.residual.detach(), dead.clamp(max=coder.d_sae - 1)
    pre_acts = torch.relu(pre_activations_of(coder, inputs.x, rows))
    pre_acts = pre_acts.masked_fill(dead >= coder.d_sae, 0)
    values, indices = sae_kernels.topk(pre_acts, k)
    code = torch.zeros_like(pre_acts).scatter(-1, indices, values)
    error = (residual - written_by(coder, code, rows)).pow(2).sum()
    return coder.cfg.aux_coefficient * error / residual.pow(2).sum().clamp_min(1e-30)


def written_by(coder: SparseCoder, code: Tensor, latents: Tensor) -> Tensor:
    """Return what some latents (m) write, (n, d_out), without b_dec, from their code (n, m).

    One that is listed twice writes the sum of its two.
    """
    if not coder.cfg.tie_decoders:
        return code @ coder.W_dec[latents]
    whole = code.new_zeros(len(code), coder.d_sae).index_add(1, latents, code)
    return coder.decode(whole) - coder.b_dec


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


LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "sparsity": code_sparsity_loss,
    "gate": gate_loss,
    "multi_topk": multi_topk_loss,
    "auxk": auxk_loss,
    "dead_penalty": pre_act_loss,
}


def extra_losses(inputs: LossInputs) -> dict[str, Tensor]:
    """Return the losses that the coder trains with besides reconstruction."""
    return {name: LOSSES[name](inputs) for name in extra_loss_names(inputs.coder.cfg)}


def extra_loss_names(cfg: CoderConfig) -> tuple[str, ...]:
    """Return which losses a coder trains with besides reconstruction: those of its activation, and
    those that it has a setting for."""
    names = tuple(name for name in ACTIVATIONS[cfg.activation].losses if name != "auxk")
    on_demand = {"auxk": cfg.k_aux, "multi_topk": cfg.multi_k, "dead_penalty": cfg.dead_penalty}
    return (*names, *(name for name, setting in on_demand.items() if setting))
