"""Adam, over moments that both training steps use."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

import sae_kernels
from sae.coder import SparseCoder
from sae.coder.coder import OF_NO_LATENT
from sae.config import MomentFormat

EPS = 1e-8


class AdamState:
    """The moments by parameter name, zero before the first step.

    Weight matrices keep theirs in `moment_format`, vectors in float32. The count of steps is not
    here: it is the trainer's.
    """

    def __init__(
        self,
        coder: SparseCoder,
        moment_format: MomentFormat = "fp32",
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        only: tuple[str, ...] | None = None,
    ):
        """Begin with zero moments of all parameters, or of those named in `only`."""
        self.betas = betas
        self.moments = {
            name: sae_kernels.new_moments(p.detach(), moment_format if p.ndim == 2 else "fp32")
            for name, p in coder.named_parameters()
            if only is None or name in only
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all that must survive, by name; live tensors, not copies."""
        named = {}
        for name, (m, v, m_scale, v_scale) in self.moments.items():
            named |= {f"{name}.exp_avg": m, f"{name}.exp_avg_sq": v}
            if m.dtype == torch.int8:
                named |= {f"{name}.exp_avg_scale": m_scale, f"{name}.exp_avg_sq_scale": v_scale}
        return named

    def averages(self) -> dict[str, Tensor]:
        """Return nothing: the weights themselves are the dictionary."""
        return {}

    @torch.no_grad()
    def step_(self, coder: SparseCoder, lr: float | Tensor, number: int | Tensor) -> None:
        """Take step `number`, from 1, by the gradients that the parameters hold."""
        parameters = {
            name: p
            for name, p in coder.named_parameters()
            if p.grad is not None and name in self.moments
        }
        wide = [n for n in parameters if self.moments[n].m.dtype == torch.float32]
        self._torch_step([parameters[n] for n in wide], [self.moments[n] for n in wide], lr, number)
        beta1, beta2 = self.betas
        for name in parameters.keys() - set(wide):
            weight = parameters[name]
            scalars = sae_kernels.adam_scalars(
                lr, number, weight.device, beta1=beta1, beta2=beta2, eps=EPS
            )
            assert weight.grad is not None
            sae_kernels.adam_step_(weight.detach(), weight.grad, self.moments[name], scalars)

    def _torch_step(
        self,
        parameters: list[torch.nn.Parameter],
        moments: list[sae_kernels.Moments],
        lr: float | Tensor,
        number: int | Tensor,
    ) -> None:
        """Take a step of torch's fused Adam: one pass over all tensors."""
        beta1, beta2 = self.betas
        # The steps before this one; torch adds one to each, and reads its rate in float32.
        before = [_scalar_like(p, number - 1.0) for p in parameters]
        rate = lr.float() if isinstance(lr, Tensor) else lr
        adam(
            [p.detach() for p in parameters],
            [p.grad for p in parameters if p.grad is not None],
            [moment.m for moment in moments],
            [moment.v for moment in moments],
            [],
            before,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=rate,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def reset_latents_(self, _: SparseCoder, latents: Tensor) -> None:
        """Forget the gradients of these latents, after their weights were replaced."""
        for name, moments in self.moments.items():
            if name not in OF_NO_LATENT:
                moments.m[latents], moments.v[latents] = 0, 0
                moments.m_scale[latents], moments.v_scale[latents] = 1, 1


def _scalar_like(x: Tensor, number: float | Tensor) -> Tensor:
    """Return a number in float32 beside x; filled in there, as a GPU would wait for a copy."""
    if isinstance(number, Tensor):
        return number.float()
    return x.new_full((), number, dtype=torch.float32)
