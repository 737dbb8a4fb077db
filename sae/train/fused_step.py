"""The training step that does no more than the maths needs: one matmul, one pass, one update.

A step of a sparse code:
  encode         the dense matmul with its selection, in chunks of tokens;
  decode         x_hat, the squared error and dL/dvalues from one gather of decoder rows;
  update         both weight gradients summed over each latent's tokens, projection, Adam,
                 renormalisation and the 16-bit shadow, a row at a time: no gradient is stored.
AuxK's gradients reach the update as those of a few rows. Where the gradient must exist as a tensor
(several processes or micro-batches, clipping) it is stored, and the update reads it.

With L = c Σ‖residual‖², c = 1 / (n · variance), dL/dx_hat is −2c times the residual; the factor
goes into the code's values, which are fewer.

On a GPU the step is one CUDA graph; what varies, the learning rate and the step's number, are
tensors. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

import sae_kernels
from sae.coder import SparseCoder
from sae.coder.activations import ACTIVATIONS
from sae.coder.latents import SparseCode
from sae.coder.losses import LossInputs, auxk_gradients, extra_loss_names
from sae.coder.step_values import StepValues
from sae.config import Config
from sae.train.adam import AdamState
from sae.train.capture import Captured
from sae.train.dead import DeadList
from sae.train.distributed import mean_over_ranks
from sae.train.state import TrainState
from sae_kernels import AdamScalars, Code, Dictionary, Gradients, Moments, Ragged, RowGradients

UPDATED_BY_ROW = Gradients._fields


@dataclass(frozen=True)
class Backward:
    """One micro-batch's gradients, before they are sums over a latent's tokens.

    code: with dL/dx_hat's factor in its values. grad_x_hat: (n, d_in), or (n, P, d_in) with
    prefixes, without that factor. x: (n, d_in), less b_dec. aux: AuxK's rows. others: gradients of
    all parameters that are not updated row by row; b_dec's lacks what comes through the encoder.
    """

    code: Code
    grad_x_hat: Tensor
    x: Tensor
    aux: RowGradients | None
    others: Mapping[str, Tensor]


class FusedStep:
    """The trainer's step for activations that have a `backward` (see `coder.activations`)."""

    def __init__(self, cfg: Config, state: TrainState, accelerator: Accelerator):
        self.cfg, self.state = cfg, state
        self.row = ACTIVATIONS[cfg.coder.activation]
        assert self.row.backward is not None, "`steps.resolve_step` chooses a coder's step"
        self.behind = self.row.backward
        device = accelerator.device
        coder, is_bf16 = state.coder, cfg.train.mixed_precision == "bf16"
        # A CPU sums in float32, so 16-bit decoder rows would only be widened again there; and it
        # gives memory back that a GPU's allocator keeps, for a page fault in every 4 KiB.
        parts = accelerator.num_processes * cfg.train.grad_accumulation_steps
        dtype = torch.bfloat16 if is_bf16 else coder.W_enc.dtype
        scratch = cfg.train.batch_tokens // parts, coder.d_sae, dtype, device
        self.coder = coder.with_memory(
            coder.W_enc.detach().bfloat16() if is_bf16 else None,
            coder.W_dec.detach().bfloat16() if is_bf16 and device.type != "cpu" else None,
            sae_kernels.new_scratch(*scratch) if device.type == "cpu" else None,
        )
        assert isinstance(state.optimiser, AdamState), "`steps.resolve_step` sees to it"
        self.moments = state.optimiser.moments
        self.dictionary = dictionary_of(self.coder, self.moments)
        self.lr = torch.zeros((), dtype=torch.float64, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)  # of the step, from 1
        self.dead = DeadList(state.dead, is_padded=device.type == "cuda")
        must_store = cfg.train.grad_accumulation_steps > 1 or accelerator.num_processes > 1
        self.stores_gradients = must_store or cfg.train.grad_clip_norm is not None
        self.captured = Captured(self._step, device)

    @torch.no_grad()
    def __call__(
        self, inputs: Iterable[Tensor], lr: float, values: StepValues | None = None
    ) -> None:
        """Train on the micro-batches of one step."""
        values = values or StepValues.fixed(self.state.coder.cfg)
        self.lr.fill_(lr)
        self.number.fill_(self.state.step + 1)
        if self.stores_gradients:
            self._step_with_stored_gradients(inputs, values)
            return
        (x,) = inputs
        # What else schedules say is for losses that autograd trains.
        read = StepValues(k=values.k, prefixes=values.prefixes)
        self.captured(x, self.dead.indices(), given=read)

    def weights_changed(self) -> None:
        """Make the 16-bit copies of the weights anew, where they are."""
        if self.coder.enc_shadow is not None:
            self.coder.enc_shadow.copy_(self.coder.W_enc.detach())
        if self.coder.dec_shadow is not None:
            self.coder.dec_shadow.copy_(self.coder.W_dec.detach())

    def _step(self, x: Tensor, dead_indices: Tensor, *, given: StepValues) -> None:
        """Train on one batch without storing a gradient."""
        back = self._backward(x, dead_indices, given)
        scalars = self._scalars()
        b_dec_term = sae_kernels.fused_update_(
            self.dictionary,
            scalars,
            back.code,
            back.grad_x_hat,
            back.x,
            more=back.aux,
            prefixes=given.prefixes or None,
        )
        back.others["b_dec"].add_(b_dec_term)
        self._update_others(back.others, scalars)

    def _step_with_stored_gradients(self, inputs: Iterable[Tensor], values: StepValues) -> None:
        """Train on micro-batches: add up, average over processes, clip, update."""
        dead_indices, total = self.dead.indices(), {}
        for x in inputs:
            gradients = self._stored(self._backward(x, dead_indices, values), values)
            for name, gradient in gradients.items():
                total[name] = total[name].add_(gradient) if name in total else gradient
        n_micro = self.cfg.train.grad_accumulation_steps
        total = {name: mean_over_ranks(gradient.div_(n_micro)) for name, gradient in total.items()}
        self._clip_(total)
        scalars = self._scalars()
        gradients = Gradients(*(total.pop(name) for name in UPDATED_BY_ROW))
        sae_kernels.dense_update_(self.dictionary, scalars, gradients)
        self._update_others(total, scalars)

    def _backward(self, x: Tensor, dead_indices: Tensor, values: StepValues) -> Backward:
        """Return the gradients of one micro-batch's mean loss, and count it for the log."""
        coder, c = self.coder, 1 / (len(x) * self.state.calibration.variance)
        code = coder.encode_training(x, values)
        assert not isinstance(code, Tensor), "the row's `backward` promises a sparse code"
        found = self._decode(code, x, values)
        behind = self.behind(coder, code, found.grad_values * c)
        losses, aux = {"reconstruction": found.loss.sum() * c}, None
        given = LossInputs(coder, x, x, found.residual, code, dead_indices, values)
        if "auxk" in extra_loss_names(coder.cfg):
            losses["auxk"], aux = auxk_gradients(given)
        losses["loss"] = torch.stack(list(losses.values())).sum()
        self.state.metrics.update(x, found.residual, code, losses)
        self.state.dead.update(code, self.number * self.cfg.train.batch_tokens)

        grad_x_hat = found.prefix_residuals if values.prefixes else found.residual
        wide = grad_x_hat[:, 0] if values.prefixes else grad_x_hat
        offsets = code.offsets if isinstance(code, Ragged) else None
        return Backward(
            Code(code.values * (-2 * c), code.indices, behind.pre_acts, offsets),
            self._for_gather(grad_x_hat),
            self._for_gather(x - coder.b_dec),
            aux,
            {"b_dec": wide.sum(0) * (-2 * c), **behind.parameters},
        )

    def _decode(self, code: SparseCode, x: Tensor, values: StepValues) -> sae_kernels.DecodeLoss:
        coder, ends = self.coder, values.prefixes
        return sae_kernels.sparse_decode_loss(
            code.values,
            code.indices,
            coder.W_dec if coder.dec_shadow is None else coder.dec_shadow,
            coder.b_dec,
            x,
            prefixes=ends or None,
            prefix_weights=[1 / len(ends)] * len(ends) if ends else None,
            offsets=code.offsets if isinstance(code, Ragged) else None,
        )

    def _for_gather(self, rows: Tensor) -> Tensor:
        """Return rows in the dtype that the weight gradients' gathers read."""
        return rows if self.coder.dec_shadow is None else rows.to(self.coder.dec_shadow.dtype)

    def _stored(self, back: Backward, values: StepValues) -> dict[str, Tensor]:
        """Return a micro-batch's gradients by parameter name."""
        ends = values.prefixes or None
        d_sae = self.coder.d_sae
        sums = sae_kernels.sparse_gradients(
            back.code, back.grad_x_hat, back.x, d_sae, prefixes=ends
        )
        back.others["b_dec"].sub_(sums.b_enc @ self.coder.W_enc)
        if back.aux is not None:
            rows = back.aux.latents.clamp(max=d_sae - 1)  # padding adds zeros there
            for total, gradient in zip(sums, back.aux[1:], strict=True):
                total.index_add_(0, rows, gradient)
        return {**sums._asdict(), **back.others}

    def _clip_(self, gradients: dict[str, Tensor]) -> None:
        """Scale all gradients down to the largest norm allowed, W_dec's as it will be projected."""
        most = self.cfg.train.grad_clip_norm
        if most is None:
            return
        W_dec, grad = self.coder.W_dec, gradients["W_dec"]
        grad.addcmul_(torch.linalg.vecdot(grad, W_dec)[:, None], W_dec, value=-1)
        norms = torch.stack([gradient.norm() for gradient in gradients.values()])
        factor = (most / (norms.norm() + 1e-6)).clamp(max=1.0)
        for gradient in gradients.values():
            gradient.mul_(factor)

    def _update_others(self, gradients: Mapping[str, Tensor], scalars: AdamScalars) -> None:
        for name, gradient in gradients.items():
            parameter = self.coder.get_parameter(name).detach()
            sae_kernels.adam_step_(parameter, gradient, self.moments[name], scalars)

    def _scalars(self) -> AdamScalars:
        beta1, beta2 = self.cfg.train.adam_betas
        return sae_kernels.adam_scalars(
            self.lr, self.number, self.lr.device, beta1=beta1, beta2=beta2
        )


def dictionary_of(coder: SparseCoder, moments: Mapping[str, Moments]) -> Dictionary:
    """Return the tensors that the update writes, as views of the coder's and of Adam's."""
    return Dictionary(
        coder.W_enc.detach(),
        coder.W_dec.detach(),
        coder.b_enc.detach(),
        moments["W_enc"],
        moments["W_dec"],
        moments["b_enc"].m,
        moments["b_enc"].v,
        coder.enc_shadow,
        coder.dec_shadow,
    )
