"""Thresholds that give a dictionary the L0 asked for on activations that it was not trained on.

All thresholds are multiplied by the one factor that lets target · n pairs of n tokens and a latent
through: f is the (target · n + 1)-th largest h / θ. Latents that overfitted fire less on what they
were trained on, so that thresholds which are right for a batch of it let too many through on new
text. Costs one encoding of the rows. Cannot see what differs between the rows and other text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.coder.activations import ACTIVATIONS
from sae.coder.layer_norm import layer_norm
from sae.coder.pre_acts import pre_activations, refined
from sae.coder.step_values import StepValues

if TYPE_CHECKING:
    from sae.coder.coder import SparseCoder

# The least factor looked for; thresholds that are to fall further are left as they are.
LEAST_FACTOR = 0.25
# Pre-activations in memory at once.
PRE_ACTS_AT_ONCE = 2**25
# A jumprelu's refined code has one threshold for both selections: the factor is found by turns.
TURNS = 8


def asked_l0(coder: SparseCoder) -> float | None:
    """Return the L0 that thresholds can be set for; None for a coder without such thresholds."""
    if coder.cfg.activation == "batchtopk":
        return float(coder.cfg.k)
    return coder.cfg.target_l0 if coder.cfg.activation == "jumprelu" else None


@torch.no_grad()
def set_thresholds_(coder: SparseCoder, x: Tensor) -> None:
    """Multiply a coder's thresholds so that its L0 on rows `x` (n, d_in) is what was asked for.

    A coder without such thresholds stays as it is.
    """
    target = asked_l0(coder)
    if target is None or len(x) == 0:
        return
    x = layer_norm(x) if coder.has_layer_norm else x
    if not coder.cfg.refine_step:
        _scale_(coder, coder.threshold, x, target, is_first=False)
    elif coder.cfg.activation == "batchtopk":
        _scale_(coder, coder.first_threshold, x, target, is_first=True)
        _scale_(coder, coder.threshold, x, target, is_first=False)
    else:
        for _ in range(TURNS):
            _scale_(coder, coder.threshold, x, target, is_first=False)


def _scale_(
    coder: SparseCoder, threshold: Tensor, x: Tensor, target: float, *, is_first: bool
) -> None:
    """Multiply `threshold` so that `target` latents a token pass the first, or last, selection."""
    near, n_rows = [], max(1, PRE_ACTS_AT_ONCE // coder.d_sae)
    for rows in x.split(n_rows):
        ratios = _pre_acts(coder, rows, is_first=is_first) / threshold
        near.append(ratios[ratios > LEAST_FACTOR])
    found, wanted = torch.cat(near), round(target * len(x))
    if len(found) <= wanted:
        return
    factor = found.kthvalue(len(found) - wanted).values
    if torch.isfinite(factor):  # a threshold of 0 has no multiple
        threshold.mul_(factor)


def _pre_acts(coder: SparseCoder, x: Tensor, *, is_first: bool) -> Tensor:
    """Return what the first or the last selection of a code is made from, (n, d_sae)."""
    if is_first or not coder.cfg.refine_step:
        return pre_activations(coder, x)
    row = ACTIVATIONS[coder.cfg.activation]

    def select(pre_acts: Tensor, is_first: bool):
        if row.infer is not None:
            return row.infer(coder, pre_acts, is_first)
        assert row.select is not None
        return row.select(coder, pre_acts, StepValues.fixed(coder.cfg), is_first)

    return refined(coder, x, select)[1]
