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
    rows get no gradient.
    Source: Anthropic, January 2025 update, "Dictionary Learning Optimization Techniques".
    """
    coder, dead = inputs.coder, inputs.dead_indices
    if dead.numel() == 0:
        return inputs.residual.new_zeros(())
    assert inputs.pre_acts is not None, "dense activations keep their pre-activations"
    pre_acts = inputs.pre_acts[:, dead]
    threshold = coder.thresholds()[dead] if hasattr(coder, "threshold") else 0.0
    norms = coder.W_dec.detach()[dead].norm(dim=1)
    below = torch.relu(threshold - pre_acts) @ norms
    return coder.cfg.dead_penalty * below.mean()
