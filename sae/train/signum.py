"""Schedule-free sign descent: no decay of the learning rate, but an average of the weights.

    z ← z − lr · sign(gradient at y),   x ← (1 − c) x + c z,   y = (1 − β) z + β x

c = lr² / Σ lr², over the steps so far: during a warm-up later steps count more, then all alike. The
parameters are y, where gradients are taken; x is the dictionary. Ours: the decoder rows of all
three have norm 1 after every step.
Source: Defazio et al. 2024, "The Road Less Scheduled" (arXiv 2405.15682), eq. 2 to 4 and its
weights under a warm-up; Bernstein et al. 2018 (arXiv 1802.04434) for the sign; EleutherAI's
sparsify trains with the two together, β = 0.95.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder import SparseCoder
from sae.coder.coder import OF_NO_LATENT, unit_rows_

TOWARDS_AVERAGE = 0.95


class Signum:
    """The sequences z and x of every parameter, by name, and the sum of the weights so far."""

    def __init__(self, coder: SparseCoder):
        parameters = dict(coder.named_parameters())
        self.z = {name: p.detach().clone() for name, p in parameters.items()}
        self.x = {name: p.detach().clone() for name, p in parameters.items()}
        self.weight_sum = torch.zeros((), dtype=torch.float64, device=coder.b_dec.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that must survive, by name; live tensors, not copies."""
        return {
            **{f"{name}.z": tensor for name, tensor in self.z.items()},
            **{f"{name}.x": tensor for name, tensor in self.x.items()},
            "weight_sum": self.weight_sum,
        }

    def averages(self) -> dict[str, Tensor]:
        """Return x by parameter name: the dictionary."""
        return self.x

    @torch.no_grad()
    def step_(self, coder: SparseCoder, lr: float | Tensor, _: int | Tensor) -> None:
        """Take a step by the gradients that the parameters hold."""
        self.weight_sum.add_(lr**2)
        share = (lr**2 / self.weight_sum.clamp_min(1e-30)).float()
        for name, y in coder.named_parameters():
            if y.grad is None:
                continue
            z, x = self.z[name], self.x[name]
            z.sub_(y.grad.sign() * lr)
            if name == coder.decoder_name:
                unit_rows_(z)
            x.lerp_(z, share)
            if name == coder.decoder_name:
                unit_rows_(x)
            y.copy_(z).lerp_(x, TOWARDS_AVERAGE)

    def reset_latents_(self, coder: SparseCoder, latents: Tensor) -> None:
        """Let z and x of these latents begin at their weights, which were replaced."""
        for name, parameter in coder.named_parameters():
            if name not in OF_NO_LATENT:
                rows = parameter.detach()[latents]
                self.z[name][latents], self.x[name][latents] = rows, rows
