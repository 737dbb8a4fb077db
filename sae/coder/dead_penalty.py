"""A penalty that lifts dead latents to where they fire.

dead_penalty = coefficient · mean over tokens of Σ_{j dead} max(0, θ_j − h_j) ‖W_dec_j‖
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sae.coder.losses import LossInputs


def pre_act_loss(inputs: LossInputs) -> Tensor:
    """Return the loss of pre-activations below their thresholds, of dead latents alone.

    θ is 0 for a coder without thresholds. Thresholds fall by it as pre-activations rise; decoder
    rows get no gradient. A dead index of d_sae is padding, and changes nothing.
    Source: Anthropic, January 2025 update, "Dictionary Learning Optimization Techniques".
    """
    coder, dead = inputs.coder, inputs.dead_indices
    if dead.numel() == 0:
        return inputs.residual.new_zeros(())
    assert inputs.pre_acts is not None, "dense activations keep their pre-activations"
    rows = dead.clamp(max=coder.d_sae - 1)
    pre_acts = inputs.pre_acts[:, rows]
    threshold = coder.thresholds()[rows] if hasattr(coder, "threshold") else 0.0
    norms = coder.W_dec.detach()[rows].norm(dim=1).masked_fill(dead >= coder.d_sae, 0)
    below = torch.relu(threshold - pre_acts) @ norms
    return coder.cfg.dead_penalty * below.mean()
