"""Losses that make a code sparse, and the weight that steers it to a number of active latents.

With w_j = ‖W_dec_j‖, summed over the places that a latent writes to, means over the tokens of a
batch:
  l1         = mean Σ_j z_j w_j / √d_in
  p_norm     = mean Σ_j (z_j w_j)^p / √d_in,  p falling from 1
  tanh       = mean Σ_j tanh(c z_j w_j)
  step       = L0 = mean Σ_j [h_j > θ_j]
  quadratic  = (L0 / target − 1)²

Each times `coder.sparsity_coefficient`, the schedule's factor and, where `coder.target_l0` is
given, the pressure: exp(I + gain · e), with e = log(L0 / target) and I the sum of rate · e over the
batches so far. So the weight grows while too many latents are active, whatever the loss, the width
and the data; nothing here waits for the device.

With the quadratic loss it is the thresholds that are multiplied, by exp(I): an optimiser moves them
by about its rate a step, while the encoder's d_in weights move a pre-activation by d_in times as
much. In 240 steps on a language model, L0 came to 7 in place of 32 by the gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.coder.latents import SparseCode, to_dense
from sae.coder.step_values import StepValues
from sae.coder.straight_through import step

if TYPE_CHECKING:
    from sae.coder.coder import SparseCoder

# The controller's rate and gain, from trials on a toy: twice the target moves the weight by an
# e-fold in 70 batches, and L0 falls below the target by no more than a tenth on its way.
PRESSURE_RATE = 0.02
PRESSURE_GAIN = 0.5
# Thresholds follow faster: a batch's L0 answers them at once, and the encoder drifts meanwhile.
THRESHOLD_RATE = 0.1
LARGEST_ERROR = 2.0
# Below this a latent's p-norm stops growing steeper: its slope at 0 would be infinite.
P_NORM_FLOOR = 1e-3


def sparsity_loss(
    coder: SparseCoder, pre_acts: Tensor, code: SparseCode | Tensor, values: StepValues
) -> Tensor:
    """Return the loss of a batch: pre_acts (n, d_sae) and its code; moves the pressure along."""
    cfg = coder.cfg
    assert cfg.sparsity_loss is not None, "the coder's configuration is resolved"
    assert cfg.sparsity_coefficient is not None
    latents = to_dense(code, coder.d_sae)
    # A gate's own strength is what can be made smaller smoothly: the code jumps where it opens.
    strength = torch.relu(pre_acts) if cfg.activation == "gated" else latents
    loss = SPARSITY[cfg.sparsity_loss](coder, pre_acts, strength, values)
    loss = cfg.sparsity_coefficient * values.sparsity * loss
    if cfg.target_l0 is None:
        return loss
    if cfg.sparsity_loss == "quadratic":
        pressure_(coder, latents, THRESHOLD_RATE)
        return loss
    return loss * pressure_(coder, latents)


@torch.no_grad()
def pressure_(coder: SparseCoder, latents: Tensor, rate: float = PRESSURE_RATE) -> Tensor:
    """Return the factor on the loss after a batch of latents (n, d_sae), a scalar; see above."""
    assert coder.cfg.target_l0 is not None, "the caller asked"
    l0 = (latents != 0).sum(-1, dtype=torch.float32).mean()
    error = (l0 / coder.cfg.target_l0).log().clamp(-LARGEST_ERROR, LARGEST_ERROR)
    coder.log_pressure.add_(error, alpha=rate)
    return (coder.log_pressure + PRESSURE_GAIN * error).exp()


def _written_norms(coder: SparseCoder) -> Tensor:
    """Return (d_sae) w: over several places a sum of norms, so that latents prefer few of them."""
    return coder.site_norms().sum(0)


def _l1(coder: SparseCoder, _: Tensor, latents: Tensor, __: StepValues) -> Tensor:
    """Source: Anthropic, April 2024 update (decoder-norm-weighted), and Lindsey et al. 2024,
    "Sparse Crosscoders", for several places; √d_in makes the coefficient mean the same at every
    width, inputs having mean norm √d_in."""
    return (latents @ _written_norms(coder)).mean() / coder.d_in**0.5


def _p_norm(coder: SparseCoder, _: Tensor, latents: Tensor, values: StepValues) -> Tensor:
    """Source: Karvonen et al. 2024 (arXiv 2408.00113), §4.2; the floor is ours."""
    weighted = latents * _written_norms(coder)
    powers = (weighted + P_NORM_FLOOR).pow(values.p) - P_NORM_FLOOR**values.p
    return powers.sum(-1).mean() / coder.d_in**0.5


def _tanh(coder: SparseCoder, _: Tensor, latents: Tensor, __: StepValues) -> Tensor:
    """Source: Anthropic, January 2025 update."""
    weighted = latents * _written_norms(coder)
    return torch.tanh(coder.cfg.tanh_scale * weighted).sum(-1).mean()


def _step(coder: SparseCoder, pre_acts: Tensor, _: Tensor, __: StepValues) -> Tensor:
    """Source: Rajamanoharan et al. 2024b (arXiv 2407.14435), eq. 9."""
    cfg = coder.cfg
    is_active = step(pre_acts, coder.thresholds(), cfg.bandwidth, reaches_x=cfg.ste_to_encoder)
    return is_active.sum(-1, dtype=torch.float32).mean()


def _quadratic(coder: SparseCoder, pre_acts: Tensor, latents: Tensor, values: StepValues) -> Tensor:
    """Source: Rajamanoharan et al. 2024b, §5.4."""
    assert coder.cfg.target_l0 is not None, "the configuration asks for it"
    return (_step(coder, pre_acts, latents, values) / coder.cfg.target_l0 - 1).square()


Loss = Callable[["SparseCoder", Tensor, Tensor, StepValues], Tensor]
SPARSITY: dict[str, Loss] = {
    "l1": _l1,
    "p_norm": _p_norm,
    "tanh": _tanh,
    "step": _step,
    "quadratic": _quadratic,
}
DEFAULT_COEFFICIENTS = {"l1": 0.1, "p_norm": 0.1, "tanh": 1e-3, "step": 1e-3, "quadratic": 1.0}
