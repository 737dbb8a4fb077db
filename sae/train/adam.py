"""Adam's moments of every parameter of a coder: one set of tensors, whichever step uses them."""

from __future__ import annotations

import torch
from torch import Tensor

import sae_kernels
from sae.coder import SparseCoder
from sae.config import MomentFormat


class AdamState:
    """The moments by parameter name, zero before the first step.

    Weight matrices keep theirs in `moment_format`, vectors in float32. The count of steps is not
    here: it is the trainer's.
    """

    def __init__(self, coder: SparseCoder, moment_format: MomentFormat):
        self.moments = {
            name: sae_kernels.new_moments(p.detach(), moment_format if p.ndim == 2 else "fp32")
            for name, p in coder.named_parameters()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all that must survive, by name; live tensors, not copies."""
        named = {}
        for name, (m, v, m_scale, v_scale) in self.moments.items():
            named |= {f"{name}.exp_avg": m, f"{name}.exp_avg_sq": v}
            if m.dtype == torch.int8:
                named |= {f"{name}.exp_avg_scale": m_scale, f"{name}.exp_avg_sq_scale": v_scale}
        return named

    def optimizer(
        self, coder: SparseCoder, *, steps_done: int, betas: tuple[float, float]
    ) -> torch.optim.Adam:
        """Return torch's Adam over these moments, which must be float32, after `steps_done` steps.

        Its learning rate is set before each step.
        """
        optimizer = torch.optim.Adam(coder.parameters(), lr=0.0, betas=betas, fused=True)
        for name, parameter in coder.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps_done), device=parameter.device),
                "exp_avg": self.moments[name].m,
                "exp_avg_sq": self.moments[name].v,
            }
        return optimizer
