"""The fused step of several coders of one shape at once: together they are one dictionary.

With M coders of F latents and a batch x (n, d), latent j of coder m is row m·F + j of the stacked
weights, and token i is row m·n + i of M·n inputs x_i − b_dec[m]:
  encode         one batched matmul (M, n, d) × (M, d, F), and each coder's own selection;
  decode         one `sparse_decode_loss` over the M·n rows;
  update         one `fused_update_` over the M·F rows, with M learning rates.
So a GPU gets few large kernels where M steps are many small ones. The coders may differ in k, in
how they select, and in what is random. A CPU, for which a large matmul is no faster than M small
ones, gains nothing by it (`fleet_groups.stacks`).

The coders' parameters and Adam's moments become views of the stacked tensors: whoever holds a
`TrainState` (checkpoints, resampling, averages) sees what it always saw. See `fused_step` for the
maths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

import sae_kernels
from sae.coder import SparseCoder
from sae.coder.activations import ACTIVATIONS
from sae.coder.latents import Latents, SparseCode
from sae.coder.losses import LossInputs, auxk_gradients, extra_loss_names
from sae.coder.step_values import StepValues
from sae.config import Config
from sae.train.adam import AdamState
from sae.train.capture import Captured
from sae.train.dead import SHORTEST_DEAD_LIST
from sae.train.state import TrainState
from sae_kernels import AdamScalars, Code, Dictionary, Moments, Ragged, RowGradients

# What pre-activations may take on a GPU: so many coders are encoded at once as fit.
BUFFER_BYTES = 2 * 2**30
# Programs of the update have this many rows each, all of one coder.
ROWS_OF_A_COUNT = 16


def can_stack(cfg: Config) -> bool:
    """Say whether a coder of the resolved `cfg` may be one of several in a stacked step."""
    train, coder = cfg.train, cfg.coder
    stores_gradients = train.grad_accumulation_steps > 1 or train.grad_clip_norm is not None
    return (
        train.step == "fused"
        and train.adam_moments == "fp32"
        and not stores_gradients
        and not (coder.prefixes or coder.random_prefixes)
        and (coder.d_sae or 0) % ROWS_OF_A_COUNT == 0
    )


class Stack(NamedTuple):
    """The tensors of M coders one behind the other: rows (M·F, d), and their moments."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    enc_moments: Moments
    dec_moments: Moments
    b_enc_moments: Moments


class StackedStep:
    """One training step of coders that `can_stack`, of equal shape and on the same batches."""

    def __init__(
        self, cfgs: Sequence[Config], states: Sequence[TrainState], accelerator: Accelerator
    ):
        self.cfgs, self.states, device = tuple(cfgs), tuple(states), accelerator.device
        self.d_sae = states[0].coder.d_sae
        stack = stacked_(states)
        is_bf16 = cfgs[0].train.mixed_precision == "bf16"
        enc, dec = (w.bfloat16() if is_bf16 else None for w in (stack.W_enc, stack.W_dec))
        self.dictionary = Dictionary(*stack[:5], *stack.b_enc_moments[:2], enc, dec)
        self.coders = tuple(
            state.coder.with_memory(self._rows(enc, m), self._rows(dec, m), None)
            for m, state in enumerate(states)
        )
        self.lrs = torch.zeros(len(states), dtype=torch.float64, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)  # of the step, from 1
        self.dead = DeadLists(states, is_padded=device.type == "cuda")
        self.captured = Captured(self._step, device)

    @torch.no_grad()
    def __call__(
        self, inputs: Sequence[Tensor], lrs: Sequence[float], values: Sequence[StepValues]
    ) -> None:
        """Train all coders on one batch, each by its own rate and values."""
        (x,) = inputs
        for rate, lr in zip(self.lrs, lrs, strict=True):
            rate.fill_(lr)
        self.number.fill_(self.states[0].step + 1)
        given = tuple(StepValues(k=value.k) for value in values)
        self.captured(x, *self.dead.indices(), given=given)

    def weights_changed(self) -> None:
        """Make the 16-bit copies of the weights anew, where they are."""
        stack = self.dictionary
        for shadow, weight in ((stack.enc_shadow, stack.W_enc), (stack.dec_shadow, stack.W_dec)):
            if shadow is not None:
                shadow.copy_(weight)

    def _rows(self, stacked: Tensor | None, m: int) -> Tensor | None:
        return None if stacked is None else stacked[m * self.d_sae : (m + 1) * self.d_sae]

    def _step(self, x: Tensor, *dead: Tensor, given: tuple[StepValues, ...]) -> None:
        """Train on x (n, d_in)."""
        n, n_coders = len(x), len(self.coders)
        c = 1 / (n * self.states[0].calibration.variance)
        centred = x - torch.stack([coder.b_dec for coder in self.coders])[:, None]
        codes = self._encode(centred, given)
        code = one_behind_the_other(codes, self.d_sae)
        centred = centred.flatten(0, 1)
        W_dec, shadow = self.dictionary.W_dec, self.dictionary.dec_shadow
        found = sae_kernels.sparse_decode_loss(
            code.values,
            code.indices,
            W_dec if shadow is None else shadow,
            None,
            centred,
            offsets=code.offsets if isinstance(code, Ragged) else None,
        )
        residuals = found.residual.view(n_coders, n, -1)
        losses = found.loss.view(n_coders, n).sum(1) * c
        more = self._auxk_and_counts(x, residuals, codes, losses, dead, given)
        behind = ACTIVATIONS[self.cfgs[0].coder.activation].backward
        assert behind is not None, "`can_stack` sees to it"
        pre_acts = behind(self.coders[0], code, found.grad_values * c).pre_acts
        offsets = code.offsets if isinstance(code, Ragged) else None
        scalars = self._scalars()
        from_encoders = sae_kernels.fused_update_(
            self.dictionary,
            scalars,
            Code(code.values * (-2 * c), code.indices, pre_acts, offsets),
            self._for_gather(found.residual),
            self._for_gather(centred),
            more=more,
        )
        self._update_b_dec(residuals.sum(1) * (-2 * c) + from_encoders, scalars)

    def _encode(self, centred: Tensor, given: Sequence[StepValues]) -> list[SparseCode]:
        """Return each coder's code of its inputs, centred (M, n, d_in)."""
        shadow, shape = self.dictionary.enc_shadow, (len(self.coders), self.d_sae)
        weights = (self.dictionary.W_enc if shadow is None else shadow).view(*shape, -1)
        biases = self.dictionary.b_enc.view(shape)[:, None].to(weights.dtype)
        bytes_each = centred.shape[1] * self.d_sae * weights.element_size()
        at_once = max(1, BUFFER_BYTES // bytes_each)
        found = []
        for start in range(0, len(self.coders), at_once):
            some = slice(start, start + at_once)
            pre_acts = torch.baddbmm(
                biases[some], centred[some].to(weights.dtype), weights[some].transpose(1, 2)
            )
            found += map(selected, self.coders[some], pre_acts, given[some])
        return found

    def _auxk_and_counts(
        self,
        x: Tensor,
        residuals: Tensor,
        codes: Sequence[SparseCode],
        losses: Tensor,
        dead: Sequence[Tensor],
        given: Sequence[StepValues],
    ) -> RowGradients | None:
        """Count the step for each coder's log, and return AuxK's rows of all."""
        parts, n_rows = [], len(self.coders) * self.d_sae
        for m, (coder, state) in enumerate(zip(self.coders, self.states, strict=True)):
            own = {"reconstruction": losses[m]}
            if "auxk" in extra_loss_names(coder.cfg):
                inputs = LossInputs(coder, x, x, residuals[m], codes[m], dead[m], given[m])
                own["auxk"], rows = auxk_gradients(inputs)
                if rows is not None:
                    latents = (rows.latents + m * self.d_sae).masked_fill(
                        rows.latents >= self.d_sae, n_rows
                    )
                    parts.append(rows._replace(latents=latents))
            own["loss"] = torch.stack(list(own.values())).sum()
            state.metrics.update(x, residuals[m], codes[m], own)
            state.dead.update(codes[m], self.number * self.cfgs[m].train.batch_tokens)
        return RowGradients(*map(torch.cat, zip(*parts, strict=True))) if parts else None

    def _update_b_dec(self, gradients: Tensor, scalars: AdamScalars) -> None:
        """Take Adam's step with each coder's b_dec; gradients (M, d_in)."""
        for m, state in enumerate(self.states):
            own = scalars._replace(rates=scalars.rates[m])
            moments = moments_of(state)["b_dec"]
            sae_kernels.adam_step_(state.coder.b_dec.detach(), gradients[m], moments, own)

    def _for_gather(self, rows: Tensor) -> Tensor:
        """Return rows in the dtype that the weight gradients' gathers read."""
        shadow = self.dictionary.dec_shadow
        return rows if shadow is None else rows.to(shadow.dtype)

    def _scalars(self) -> AdamScalars:
        beta1, beta2 = self.cfgs[0].train.adam_betas
        return sae_kernels.adam_scalars(
            self.lrs, self.number, self.lrs.device, beta1=beta1, beta2=beta2
        )


class DeadLists:
    """The coders' lists of dead latents; on a GPU of one length, for fewer graphs."""

    def __init__(self, states: Sequence[TrainState], *, is_padded: bool):
        self.states, self.is_padded = states, is_padded
        self._made_from: list[Tensor] = []
        self._lists: list[Tensor] = []

    def indices(self) -> list[Tensor]:
        """Return the lists, filled up with d_sae; the same tensors until one is made anew."""
        listed = [state.dead.indices for state in self.states]
        if [id(one) for one in listed] != [id(one) for one in self._made_from]:
            self._made_from = self._lists = listed
            longest = max(one.numel() for one in listed)
            if self.is_padded and longest:
                length = max(SHORTEST_DEAD_LIST, 1 << (longest - 1).bit_length())
                d_sae = self.states[0].coder.d_sae
                self._lists = [one.new_full((length,), d_sae) for one in listed]
                for padded, one in zip(self._lists, listed, strict=True):
                    padded[: one.numel()] = one
        return self._lists


def selected(coder: SparseCoder, pre_acts: Tensor, values: StepValues) -> SparseCode:
    """Return the code that a coder selects from its pre-activations (n, F)."""
    select = ACTIVATIONS[coder.cfg.activation].select
    assert select is not None
    code = select(coder, pre_acts, values, False)
    assert not isinstance(code, Tensor), "an activation with a `backward` promises it"
    return code._replace(values=code.values.float())


def one_behind_the_other(codes: Sequence[SparseCode], d_sae: int) -> SparseCode:
    """Return codes of n tokens each as one of all their tokens, latents shifted by d_sae a code.

    Ragged only where one of them is, or where they differ in k. None has padding: BatchTopK keeps
    exactly as many as it is asked for.
    """
    values = [code.values for code in codes]
    indices = [code.indices + m * d_sae for m, code in enumerate(codes)]
    is_plain = all(isinstance(code, Latents) for code in codes)
    if is_plain and len({value.shape[-1] for value in values}) == 1:
        return Latents(torch.cat(values), torch.cat(indices))
    ends, before = [values[0].new_zeros(1, dtype=torch.int64)], 0
    for code in codes:
        if isinstance(code, Ragged):
            own = code.offsets[1:]
        else:
            n, k = code.values.shape
            own = torch.arange(k, n * k + 1, k, device=code.values.device)
        ends.append(own + before)
        before += code.values.numel()
    flat_values, flat_indices = (
        torch.cat([part.reshape(-1) for part in parts]) for parts in (values, indices)
    )
    return Ragged(flat_values, flat_indices, torch.cat(ends))


def moments_of(state: TrainState) -> dict[str, Moments]:
    """Return Adam's moments of a coder's parameters, by name."""
    assert isinstance(state.optimiser, AdamState), "`steps.resolve_step` sees to it"
    return state.optimiser.moments


def stacked_(states: Sequence[TrainState]) -> Stack:
    """Return the stacked tensors of all `states`, whose own become views of them."""
    weights, moments = {}, {}
    for name in ("W_enc", "W_dec", "b_enc"):
        weights[name] = torch.cat([s.coder.get_parameter(name).detach() for s in states])
        of_all = [moments_of(state)[name] for state in states]
        moments[name] = Moments(*(torch.cat(parts) for parts in zip(*of_all, strict=True)))
        for m, state in enumerate(states):
            rows = slice(m * state.coder.d_sae, (m + 1) * state.coder.d_sae)
            state.coder.get_parameter(name).data = weights[name][rows]
            moments_of(state)[name] = Moments(*(part[rows] for part in moments[name]))
    return Stack(*weights.values(), *moments.values())
