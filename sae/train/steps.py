"""Which training step trains a coder: the fused one where it can, else automatic differentiation.

Both take the same state one step further and agree to rounding. A third would be a class with
`Step`'s call and a row in STEPS.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor

from sae.coder.activations import ACTIVATIONS
from sae.coder.step_values import StepValues
from sae.config import Config
from sae.train.autograd_step import AutogradStep
from sae.train.distributed import is_first_process
from sae.train.fused_step import FusedStep
from sae.train.state import TrainState


class KeepsWeights(Protocol):
    """What may hold copies of weights."""

    def weights_changed(self) -> None:
        """Take note that weights were changed between two steps."""
        ...


class Step(KeepsWeights, Protocol):
    """One optimiser step: gradients, update, and what the log and the dead list count."""

    def __call__(
        self, inputs: Iterable[Tensor], lr: float, values: StepValues | None = None
    ) -> None:
        """Train on this process's micro-batches of rows, each (n, Σ widths) float32 in training
        units.

        `values` are what schedules say now; None leaves the configuration's own.
        """
        ...


STEPS: dict[str, Callable[[Config, TrainState, Accelerator], Step]] = {
    "fused": FusedStep,
    "autograd": AutogradStep,
}

# Losses and encoders whose gradients the fused step does not know.
ONLY_BY_AUTOGRAD = ("refine_step", "multi_k", "tilt", "detach_prefixes")


def make_step(cfg: Config, state: TrainState, accelerator: Accelerator) -> Step:
    """Return the step that the resolved `cfg` names, over `state` as it stands (loaded, if so)."""
    return STEPS[resolve_step(cfg).train.step](cfg, state, accelerator)


def resolve_step(cfg: Config) -> Config:
    """Return `cfg` with `train.step` chosen; warn where auto could not choose the fused one.

    Errors: ValueError where the fused step is asked for and cannot train the coder.
    """
    asked, obstacle = cfg.train.step, _obstacle(cfg)
    if asked == "auto":
        if obstacle and is_first_process():
            warnings.warn(
                f"The fused training step does not train {obstacle}; falling back to autograd, "
                "which is slower. Set `train.step: autograd` to say so yourself.",
                stacklevel=2,
            )
        asked = "autograd" if obstacle else "fused"
    if asked == "fused" and obstacle:
        raise ValueError(
            f"`train.step: fused` needs what the fused step trains; got {obstacle}. Set "
            "`train.step: autograd`, or choose adam and one of "
            f"{', '.join(name for name, row in ACTIVATIONS.items() if row.backward)}."
        )
    return replace(cfg, train=replace(cfg.train, step=asked))


def _obstacle(cfg: Config) -> str | None:
    """Return the setting that the fused step cannot train with, or None."""
    if cfg.train.optimizer != "adam":
        return f"`train.optimizer: {cfg.train.optimizer}`"
    if ACTIVATIONS[cfg.coder.activation].backward is None:
        return f"`coder.activation: {cfg.coder.activation}`"
    if cfg.train.freeze_decoder:
        return "`train.freeze_decoder`"
    if cfg.train.model_loss != "none":
        return f"`train.model_loss: {cfg.train.model_loss}`"
    if cfg.coder.site in ("transcoder", "cross_layer"):
        return f"`coder.site: {cfg.coder.site}`"
    for name in ONLY_BY_AUTOGRAD:
        if getattr(cfg.coder, name):
            return f"`coder.{name}: {getattr(cfg.coder, name)}`"
    return None
