"""What turns gradients into updates, by `train.optimizer`.

To add one: a class with `Optimiser`'s methods, a row in OPTIMISERS, its name in
`config.OptimizerName`, and its learning rate in `schedule.derived_lr`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from sae.coder import SparseCoder
from sae.config import TrainConfig
from sae.train.adam import AdamState
from sae.train.muon import Muon
from sae.train.signum import Signum


class Optimiser(Protocol):
    """State of every parameter of a coder, by name; rows of all but b_dec's belong to latents."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all that must survive, "parameter.part" by name; live tensors, not copies."""
        ...

    def averages(self) -> Mapping[str, Tensor]:
        """Return the weights to keep by parameter name, where they are not those that train."""
        ...

    def step_(self, coder: SparseCoder, lr: float | Tensor, number: int | Tensor, /) -> None:
        """Take step `number`, from 1, by the gradients that the parameters hold.

        Both may be scalars on the device, so that a captured step reads what they are now.
        """
        ...

    def reset_latents_(self, coder: SparseCoder, latents: Tensor, /) -> None:
        """Begin anew with `latents` (n) int64, whose weights were replaced."""
        ...


OPTIMISERS: dict[str, Callable[[SparseCoder, TrainConfig], Optimiser]] = {
    "adam": lambda coder, cfg: AdamState(coder, cfg.adam_moments, cfg.adam_betas),
    "muon": lambda coder, cfg: Muon(coder, cfg.adam_betas),
    "signum": lambda coder, _: Signum(coder),
}
