"""Everything of a run that must survive a kill, in one place.

`scalars` and `tensors` are the same on every process and written once; `own_tensors` and the
source's lanes are each process's own, and can be divided among another number of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.coder import SparseCoder, normalise_decoder_
from sae.coder.set_thresholds import asked_l0, set_thresholds_
from sae.stream.normalisation import Normaliser
from sae.stream.source import ActivationSource
from sae.train.dead import DeadLatents
from sae.train.ema import Ema
from sae.train.metrics import MetricSums
from sae.train.optimisers import Optimiser

if TYPE_CHECKING:
    from sae.train.model_loss import ModelLoss

LAST_FIRED = "dead.last_fired_at"


@dataclass(frozen=True)
class Calibration:
    """What was estimated before the first step.

    normaliser: from raw activations to the units that the coder is trained in; the rest is in
    these, and of what is written. variance: mean squared distance of activations from their mean.
    mean: (d_out). b_dec: (d_out), its start.
    """

    normaliser: Normaliser
    variance: float
    mean: Tensor
    b_dec: Tensor


@dataclass
class TrainState:
    """The loop's state: a finished step more is all that one turn of the loop adds to it."""

    coder: SparseCoder
    optimiser: Optimiser
    dead: DeadLatents
    metrics: MetricSums
    source: ActivationSource
    calibration: Calibration
    batch_tokens: int
    step: int = 0
    ema: Ema | None = None
    model_loss: ModelLoss | None = None  # has no state: its contexts follow from the step

    @property
    def tokens_seen(self) -> int:
        """Tokens that all finished steps trained on, over all processes."""
        return self.step * self.batch_tokens

    def raw_coder(self) -> SparseCoder:
        """Return a copy of the coder that works on raw activations: what is saved."""
        raw = self.calibration.normaliser.to_raw_units(self._kept())
        reserved_rows = getattr(self.source, "reserved_rows", lambda: None)
        if asked_l0(raw) is not None and (rows := reserved_rows()) is not None:
            set_thresholds_(raw, raw.sites.read(rows.to(raw.b_dec)))
        raw.metadata["sae_training_tokens"] = self.tokens_seen
        return raw

    def averages(self) -> Mapping[str, Tensor]:
        """Return the weights to keep by parameter name, where they are not those that train."""
        return self.ema.tensors if self.ema else self.optimiser.averages()

    def _kept(self) -> SparseCoder:
        """Return the coder to keep: the one that trains, or another with the averages."""
        averages = self.averages()
        if not averages:
            return self.coder
        kept = SparseCoder(
            self.coder.d_in, self.coder.cfg, self.coder.metadata, sites=self.coder.sites
        )
        kept.load_state_dict(self.coder.state_dict())
        with torch.no_grad():
            for name, average in averages.items():
                kept.get_parameter(name).copy_(average)
        normalise_decoder_(kept)
        return kept.to(self.coder.b_dec.device)

    def scalars(self) -> dict[str, Any]:
        """Return the part of the state that is plain numbers."""
        return {"step": self.step, "variance": self.calibration.variance}

    def tensors(self) -> dict[str, Tensor]:
        """Return the part of the state that is tensors, by name; live tensors, not copies."""
        normaliser = self.calibration.normaliser.tensors()
        ema = self.ema.tensors if self.ema else {}
        return {
            **{f"coder.{name}": value for name, value in coder_tensors(self.coder).items()},
            **{f"optimiser.{name}": value for name, value in self.optimiser.tensors().items()},
            **{f"ema.{name}": value for name, value in ema.items()},
            **{f"normaliser.{name}": value for name, value in normaliser.items()},
            "mean": self.calibration.mean,
            "dead.indices": self.dead.indices,
        }

    def own_tensors(self) -> dict[str, Tensor]:
        """Return this process's counts since the processes last added them up; live tensors."""
        return {
            **{f"metrics.{name}": value for name, value in self.metrics.sums.items()},
            LAST_FIRED: self.dead.last_fired_at,
            **({} if self.dead.counts is None else {"dead.counts": self.dead.counts}),
        }

    def merged_own(self, saved: Sequence[Mapping[str, Tensor]], rank: int) -> dict[str, Tensor]:
        """Return what process `rank` goes on with from the `own_tensors` of all that saved.

        As many processes as saved take up their own. Otherwise the first takes the sums of all, and
        every one the latest firing that any saw.
        """
        mine = {}
        for name in self.own_tensors():
            parts = torch.stack([own[name] for own in saved])
            if name == LAST_FIRED:
                mine[name] = parts.amax(0)
            else:
                mine[name] = parts.sum(0) if rank == 0 else torch.zeros_like(parts[0])
        return mine

    def load_(self, scalars: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take over a saved state, in place.

        Errors: ValueError where a tensor is missing; nothing is changed then.
        """
        wanted = {**self.tensors(), **self.own_tensors()}
        if missing := sorted(wanted.keys() - tensors.keys()):
            raise ValueError(
                f"a checkpoint must hold all of the trainer's state; it lacks {missing[:4]}. It "
                "was written by another version of this package: resume with that, or begin anew "
                "in another folder."
            )
        self.step = scalars["step"]
        self.calibration = replace(self.calibration, variance=scalars["variance"])
        device = self.dead.indices.device
        self.dead.indices = tensors["dead.indices"].to(device)
        for name, value in wanted.items():
            if name != "dead.indices":
                value.detach().copy_(tensors[name])


def coder_tensors(coder: SparseCoder) -> dict[str, Tensor]:
    """Return a coder's parameters and buffers, one matrix under two names once."""
    return {**dict(coder.named_parameters()), **dict(coder.named_buffers())}
