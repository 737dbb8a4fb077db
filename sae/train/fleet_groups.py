"""Which members of a fleet take their steps together: alike ones, as one batched step on a GPU.

On a CPU, where a large matmul is no faster than several small ones, every member is a group of its
own, and `side_by_side` divides the threads among them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from sae.coder.activations import ACTIVATIONS
from sae.coder.step_values import StepValues
from sae.config import Config
from sae.train.schedule import lr_at, values_at
from sae.train.stacked_step import StackedStep, can_stack
from sae.train.state import TrainState
from sae.train.steps import KeepsWeights, Step, make_step
from sae.train.trainer import tended


@dataclass(frozen=True)
class Trainee:
    """A member in training: its resolved configuration, its state, and its hookpoint's number."""

    name: str
    cfg: Config
    state: TrainState
    place: int


class GroupStep(KeepsWeights, Protocol):
    """One optimiser step of several members on the same micro-batches."""

    def __call__(
        self, inputs: Sequence[Tensor], lrs: Sequence[float], values: Sequence[StepValues]
    ) -> None:
        """Train on the micro-batches, each (n, d_in) float32, by each member's rate and values."""
        ...


class Alone:
    """The step of a group of one."""

    def __init__(self, step: Step):
        self.step = step

    def __call__(
        self, inputs: Sequence[Tensor], lrs: Sequence[float], values: Sequence[StepValues]
    ) -> None:
        """Train the only member."""
        self.step(iter(inputs), lrs[0], values[0])

    def weights_changed(self) -> None:
        """Pass it on."""
        self.step.weights_changed()


@dataclass(frozen=True)
class Group:
    """Members that step together, all on one hookpoint."""

    trainees: tuple[Trainee, ...]
    step: GroupStep

    @property
    def place(self) -> int:
        """The number of their hookpoint."""
        return self.trainees[0].place

    def train(self, inputs: Sequence[Tensor]) -> None:
        """Take one step of all members on the micro-batches, each (n, d_in) in training units."""
        for trainee in self.trainees:
            # Sorting and resampling change the state alone; the inputs stay what they are.
            tended(trainee.cfg, trainee.state, self.step, iter(inputs))
        number = self.trainees[0].state.step
        lrs = [lr_at(number, trainee.cfg.train) for trainee in self.trainees]
        self.step(inputs, lrs, [values_at(number, trainee.cfg) for trainee in self.trainees])
        for trainee in self.trainees:
            trainee.state.step += 1
            if trainee.state.ema is not None:
                trainee.state.ema.update_(trainee.state.coder, trainee.state.step)


def make_groups(trainees: Sequence[Trainee], accelerator: Accelerator) -> list[Group]:
    """Return groups that hold every member once, over their states as they stand (loaded, if so).

    Coders of one width on one hookpoint are stacked where device and step allow it; the others
    are groups of one.
    """
    alike: dict[Hashable, list[Trainee]] = {}
    groups = []
    for trainee in trainees:
        if stacks(accelerator.device) and can_stack(trainee.cfg):
            backward = ACTIVATIONS[trainee.cfg.coder.activation].backward
            key = trainee.place, trainee.state.coder.d_sae, backward
            alike.setdefault(key, []).append(trainee)
        else:
            groups.append(alone(trainee, accelerator))
    for some in alike.values():
        if len(some) == 1:
            groups.append(alone(some[0], accelerator))
        else:
            cfgs, states = [t.cfg for t in some], [t.state for t in some]
            groups.append(Group(tuple(some), StackedStep(cfgs, states, accelerator)))
    return groups


def stacks(device: torch.device) -> bool:
    """Say whether a device is faster with one large step than with several small ones."""
    return device.type != "cpu"


def alone(trainee: Trainee, accelerator: Accelerator) -> Group:
    """Return a group of one."""
    return Group((trainee,), Alone(make_step(trainee.cfg, trainee.state, accelerator)))
