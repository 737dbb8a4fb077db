"""The training step by automatic differentiation: for every coder, on one process or many.

Plain and general; `fused_step` does the same with less work for the coders that it knows. On one
GPU, on whole batches, the step is a CUDA graph, backward pass and update included.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sae.coder import SparseCoder, normalise_decoder_, project_decoder_gradient_
from sae.coder.latents import SparseCode
from sae.coder.losses import LossInputs, extra_losses
from sae.coder.reconstruction import reconstruct
from sae.coder.step_values import StepValues
from sae.config import Config
from sae.train.capture import Captured
from sae.train.dead import DeadList
from sae.train.state import TrainState


class TrainingModule(nn.Module):
    """The part of a step that is differentiated; what data-parallel training wraps."""

    def __init__(self, coder: SparseCoder, variance: float, precision: str = "no"):
        super().__init__()
        self.coder, self.variance, self.is_bf16 = coder, variance, precision == "bf16"

    def forward(
        self, x: Tensor, dead_indices: Tensor, values: StepValues
    ) -> tuple[dict[str, Tensor], Tensor, SparseCode | Tensor]:
        """Return the losses of rows x (n, sites.width), "loss" being their sum; the residual; the
        code."""
        coder, variance = self.coder, self.variance
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.is_bf16):
            read, target = coder.sites.read(x), coder.target(x)
            encoding = coder.encode_for_losses(read, values)
            residual, loss = reconstruct(coder, encoding.code, target, values, variance)
            given = LossInputs(
                coder,
                read,
                target,
                residual,
                encoding.code,
                dead_indices,
                values,
                encoding.pre_acts,
                encoding.wider,
                variance,
            )
            losses = {"reconstruction": loss, **extra_losses(given)}
        weighted = {**losses, "reconstruction": values.reconstruction * loss}
        total = torch.stack(list(weighted.values())).sum()
        return {"loss": total, **losses}, residual, encoding.code


class AutogradStep:
    """Backward passes, projection, clipping, the optimiser's update and renormalisation."""

    def __init__(self, cfg: Config, state: TrainState, accelerator: Accelerator):
        self.cfg, self.state, self.accelerator = cfg, state, accelerator
        state.coder.W_dec.requires_grad_(not cfg.train.freeze_decoder)
        self.module = accelerator.prepare_model(
            TrainingModule(state.coder, state.calibration.variance, cfg.train.mixed_precision)
        )
        device = accelerator.device
        is_whole = accelerator.num_processes == cfg.train.grad_accumulation_steps == 1
        self.is_captured = device.type == "cuda" and is_whole and cfg.train.model_loss == "none"
        self.dead = DeadList(state.dead, is_padded=self.is_captured)
        self.lr = torch.zeros((), dtype=torch.float64, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)  # of the step, from 1
        self.captured = Captured(self._on_device, device)

    def __call__(
        self, inputs: Iterable[Tensor], lr: float, values: StepValues | None = None
    ) -> None:
        """Train on the micro-batches of one step."""
        values = values or StepValues.fixed(self.state.coder.cfg)
        dead_indices, number = self.dead.indices(), self.state.step + 1
        if not self.is_captured:
            self._step(inputs, dead_indices, values, lr, number)
            return
        self.lr.fill_(lr)
        self.number.fill_(number)
        (x,) = inputs
        self.captured(x, dead_indices, given=values)

    def _on_device(self, x: Tensor, dead_indices: Tensor, *, given: StepValues) -> None:
        """Train on one batch; what varies by step is read on the device."""
        self._step((x,), dead_indices, given, self.lr, self.number)

    def _step(
        self,
        inputs: Iterable[Tensor],
        dead_indices: Tensor,
        values: StepValues,
        lr: float | Tensor,
        number: int | Tensor,
    ) -> None:
        coder = self.state.coder
        coder.zero_grad(set_to_none=True)  # a capture that failed may have left some
        self._accumulate_gradients(inputs, dead_indices, values, number)
        project_decoder_gradient_(coder)
        if self.cfg.train.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(coder.parameters(), self.cfg.train.grad_clip_norm)
        model_loss = self.state.model_loss
        if model_loss is not None:
            number = model_loss.number_of(self.state.step)
        self.state.optimiser.step_(coder, lr, number)
        coder.zero_grad(set_to_none=True)
        if not self.cfg.train.freeze_decoder:
            normalise_decoder_(coder)

    def _of_model(self, values: StepValues) -> tuple[Tensor, Tensor] | None:
        """Add the gradients of the model's loss, and return it with its weight and without; None
        where the run has none. It comes first, so that processes add it up with the others."""
        model_loss, state = self.state.model_loss, self.state
        if model_loss is None:
            return None
        if not model_loss.is_due(state.step):
            none = torch.zeros((), device=state.coder.b_dec.device)
            return none, none
        model_loss.begin_(state.optimiser, state.step)
        added = model_loss(state.coder, state.calibration, values, state.step)
        added.differentiable.backward()
        return added.weighted, added.plain

    def weights_changed(self) -> None:
        """Do nothing: this step keeps no copies of weights."""

    def _accumulate_gradients(
        self,
        inputs: Iterable[Tensor],
        dead_indices: Tensor,
        values: StepValues,
        number: int | Tensor,
    ) -> None:
        """Add up the gradients of the micro-batches, and what the log and AuxK count."""
        state, n_micro = self.state, self.cfg.train.grad_accumulation_steps
        added = self._of_model(values)
        for micro, x in enumerate(inputs):
            is_last = micro == n_micro - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.module):
                losses, residual, code = self.module(x, dead_indices, values)
                (losses["loss"] / n_micro).backward()
            if added is not None:
                losses = {**losses, "loss": losses["loss"] + added[0], "model": added[1]}
            state.metrics.update(state.coder.sites.written(x), residual, code, losses)
            state.dead.update(code, number * self.cfg.train.batch_tokens)
