"""Muon: momentum, orthogonalised, for weight matrices; Adam for vectors.

    M ← μ M + (1 − μ) G,   U = (1 − μ) G + μ M,   W ← W − lr · 0.2 √max(n, d) · orth(U)

orth brings all singular values near 1: five Newton–Schulz iterations of a quintic polynomial. The
factor makes an update's root mean square that of Adam's, so that one learning rate serves both.
Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (momentum with
Nesterov's look-ahead, the polynomial); Liu et al. 2025 (arXiv 2502.16982), §2.2 (the factor). Ours:
no weight decay, as decoder rows have norm 1; the moving average of gradients in place of their sum,
which orth makes the same; float32 on a CPU, where bf16 is no faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder import SparseCoder
from sae.train.adam import AdamState

MOMENTUM = 0.95
ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
ADAM_RMS = 0.2


class Muon:
    """The momentum of every matrix, and Adam's moments of every vector, by parameter name."""

    def __init__(self, coder: SparseCoder, betas: tuple[float, float] = (0.9, 0.999)):
        self.momentum, vectors = {}, {}
        for name, parameter in coder.named_parameters():
            if parameter.ndim == 2:
                self.momentum[name] = torch.zeros_like(parameter.detach())
            else:
                vectors[name] = parameter
        self.adam = AdamState(coder, betas=betas, only=tuple(vectors))

    def tensors(self) -> dict[str, Tensor]:
        """Return all that must survive, by name; live tensors, not copies."""
        momentum = {f"{name}.momentum": tensor for name, tensor in self.momentum.items()}
        return {**momentum, **self.adam.tensors()}

    def averages(self) -> dict[str, Tensor]:
        """Return nothing: the weights themselves are the dictionary."""
        return {}

    @torch.no_grad()
    def step_(self, coder: SparseCoder, lr: float | Tensor, number: int | Tensor) -> None:
        """Take step `number`, from 1, by the gradients that the parameters hold."""
        self.adam.step_(coder, lr, number)
        for name, momentum in self.momentum.items():
            weight = coder.get_parameter(name)
            if weight.grad is None:
                continue
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            ahead = torch.lerp(weight.grad, momentum, MOMENTUM)
            size = ADAM_RMS * max(weight.shape) ** 0.5
            weight.sub_(orthogonalised(ahead).to(weight.dtype) * (lr * size))

    def reset_latents_(self, coder: SparseCoder, latents: Tensor) -> None:
        """Forget the gradients of these latents, after their weights were replaced."""
        self.adam.reset_latents_(coder, latents)
        for momentum in self.momentum.values():
            momentum[latents] = 0


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return a matrix (n, d) with about the singular vectors of `matrix`, and values in 0.7 to 1.3.

    Singular values below a hundredth of the largest stay smaller; zeros stay zeros.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.T  # on the short side
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x
