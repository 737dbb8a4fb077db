"""A moving average of the weights, which is then what is saved as the dictionary."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder import SparseCoder
from sae.coder.coder import OF_NO_LATENT


class Ema:
    """The average of every parameter, by name; buffers are not averaged.

    The decay of step t, from 1, is at most (1 + t) / (10 + t): the first weights soon fade.
    Source: TensorFlow's ExponentialMovingAverage, `num_updates`.
    """

    def __init__(self, coder: SparseCoder, decay: float):
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in coder.named_parameters()}

    @torch.no_grad()
    def update_(self, coder: SparseCoder, number: int) -> None:
        """Add the weights after step `number`, from 1."""
        decay = min(self.decay, (1 + number) / (10 + number))
        parameters = dict(coder.named_parameters())
        for name, average in self.tensors.items():
            average.lerp_(parameters[name], 1 - decay)

    @torch.no_grad()
    def reset_latents_(self, coder: SparseCoder, latents: Tensor) -> None:
        """Let the averages of these latents begin at their weights, which were replaced."""
        for name, parameter in coder.named_parameters():
            if name not in OF_NO_LATENT:
                self.tensors[name][latents] = parameter[latents]
