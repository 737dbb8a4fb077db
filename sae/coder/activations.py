"""The sparsifying activation functions, one registry row each.

An activation selects a code from pre-activations (x − b_dec) W_encᵀ + b_enc, in the form that is
cheapest to decode and to train through: `Latents`, a ragged code, or the dense one (n, d_sae).
Prefixes, refinement and most losses are for any of them.

To add one: a function or two here and a row in ACTIVATIONS, its name in `config.ActivationName`.
With `backward` the fused training step takes it; without, autograd does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

import sae_kernels
from sae.coder.latents import Latents, SparseCode
from sae.coder.pre_acts import pre_activations
from sae.coder.step_values import StepValues
from sae.coder.straight_through import jumprelu

if TYPE_CHECKING:
    from sae.coder.coder import SparseCoder


DEFAULT_THRESHOLD = 0.1


class CodeGradients(NamedTuple):
    """What a code's values pass on: dL/dpre_acts, and gradients of parameters of its own, by name.

    Losses on the code besides reconstruction and AuxK are part of both.
    """

    pre_acts: Tensor  # as the code's values
    parameters: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Activation:
    """One activation function.

    Attributes:
        select: the code of pre-activations (n, d_sae) while training; `is_first` tells the first of
            the two selections of a refined code. losses: names of those it trains with besides
            reconstruction; the first is on by default. saelens_architecture: its name there.
        infer: the code once training is over, where that is another one.
        encode: the code of x (n, d_in) directly, where that costs less than `select`.
        own: what it adds to a coder: parameters and buffers by name, (d_sae) each.
        backward: what the fused training step needs: the gradients behind a sparse code, from
            dL/dvalues; None leaves the coder to autograd.
    """

    losses: tuple[str, ...]
    saelens_architecture: str
    select: Callable[[SparseCoder, Tensor, StepValues, bool], SparseCode | Tensor] | None = None
    infer: Callable[[SparseCoder, Tensor, bool], Tensor] | None = None
    encode: Callable[[SparseCoder, Tensor, StepValues], SparseCode | Tensor] | None = None
    own: Callable[[SparseCoder], Mapping[str, Tensor]] | None = None
    backward: Callable[[SparseCoder, SparseCode, Tensor], CodeGradients] | None = None


def select_topk(coder: SparseCoder, pre_acts: Tensor, values: StepValues, _: bool) -> Latents:
    """Keep each token's k largest positive pre-activations, or the k largest in magnitude."""
    if coder.cfg.signed:
        indices = sae_kernels.topk(pre_acts.detach().abs(), values.k)[1]
        return Latents(pre_acts.gather(-1, indices), indices)
    kept, indices = sae_kernels.topk(pre_acts, values.k)
    return Latents(torch.relu(kept), indices)


def encode_topk(coder: SparseCoder, x: Tensor, values: StepValues) -> Latents:
    """Keep each token's k largest positive pre-activations, which are never all in memory.

    Source: Gao et al. 2024 (arXiv 2406.04093), eq. 1, with a ReLU after the selection.
    """
    if coder.cfg.signed:
        return select_topk(coder, pre_activations(coder, x), values, False)
    kept, indices = sae_kernels.encode_topk(
        x,
        coder.W_enc,
        coder.b_enc,
        coder.b_dec,
        k=values.k,
        shadow=coder.enc_shadow,
        scratch=coder.scratch,
    )
    return Latents(kept, indices)


def select_batchtopk(
    coder: SparseCoder, pre_acts: Tensor, values: StepValues, is_first: bool
) -> SparseCode:
    """Keep the batch's k · n largest positive pre-activations, and follow the least of them.

    The batch is what one process sees at once. Source: Bussmann et al. 2024 (arXiv 2412.06410),
    §3; the threshold follows as a mean that forgets, by `coder.threshold_rate` a batch.
    """
    code, least = sae_kernels.batch_topk(pre_acts, values.k * len(pre_acts))
    running = coder.first_threshold if is_first else coder.threshold
    _follow_(running, least.detach().clamp_min(0).to(running.dtype), coder.cfg.threshold_rate)
    return code._replace(values=torch.relu(code.values))


def _follow_(running: Tensor, least: Tensor, rate: float) -> None:
    """Move the running threshold towards a batch's; it begins at the first."""
    running.copy_(torch.where(running == 0, least, torch.lerp(running, least, rate)))


def above_threshold(coder: SparseCoder, pre_acts: Tensor, is_first: bool) -> Tensor:
    """Return the pre-activations above the running thresholds, dense."""
    threshold = coder.first_threshold if is_first else coder.threshold
    return torch.relu(pre_acts).masked_fill(pre_acts <= threshold, 0)


def backward_where_active(_: SparseCoder, code: SparseCode, grad_values: Tensor) -> CodeGradients:
    """Pass the gradient on where a latent fired: nothing moves those that were not selected."""
    return CodeGradients(grad_values.masked_fill(code.values == 0, 0))


def select_jumprelu(coder: SparseCoder, pre_acts: Tensor, _: StepValues, __: bool) -> Tensor:
    """Return the pre-activations above their thresholds, dense.

    Source: Rajamanoharan et al. 2024b (arXiv 2407.14435), eq. 3 and 11; the thresholds themselves
    are the parameters, kept from falling below 0, not their logarithms.
    """
    with torch.no_grad():
        coder.threshold.clamp_min_(0)
    cfg = coder.cfg
    return jumprelu(pre_acts, coder.thresholds(), cfg.bandwidth, reaches_x=cfg.ste_to_encoder)


def select_relu(_: SparseCoder, pre_acts: Tensor, __: StepValues, ___: bool) -> Tensor:
    """Return max(0, pre_acts), dense. Source: Bricken et al. 2023, Towards Monosemanticity."""
    return torch.relu(pre_acts)


def select_gated(coder: SparseCoder, pre_acts: Tensor, _: StepValues, __: bool) -> Tensor:
    """Return the magnitudes of the latents whose gates are open, dense.

    The magnitudes' weights are the gates', each row scaled: exp(r_mag) h + b_mag with
    h = pre_acts − b_enc. Source: Rajamanoharan et al. 2024a (arXiv 2404.16014), eq. 6 and 7.
    """
    magnitudes = torch.relu((pre_acts - coder.b_enc) * coder.r_mag.exp() + coder.b_mag)
    return magnitudes.masked_fill(pre_acts <= 0, 0)


def encode_matching_pursuit(coder: SparseCoder, x: Tensor, values: StepValues) -> Latents:
    """Take away from x, k times, its projection on the decoder row that has most of it.

    A latent may be taken again: its slots add up. Gradients reach the rows that were taken.
    Source: Costa et al. 2025 (arXiv 2506.03093), algorithm 1, with a fixed number of steps.
    """
    left, taken, indices = x - coder.b_dec, [], []
    for _ in range(values.k):
        chosen = (left.detach() @ coder.W_dec.detach().T).argmax(-1)
        rows = coder.W_dec[chosen]
        value = torch.relu((left * rows).sum(-1, keepdim=True))
        left = left - value * rows
        taken.append(value)
        indices.append(chosen[:, None])
    return Latents(torch.cat(taken, -1), torch.cat(indices, -1))


def _batchtopk_own(coder: SparseCoder) -> dict[str, Tensor]:
    thresholds = {"threshold": torch.zeros(coder.d_sae)}
    if coder.cfg.refine_step:
        thresholds["first_threshold"] = torch.zeros(coder.d_sae)
    return thresholds


def _jumprelu_own(coder: SparseCoder) -> dict[str, Tensor]:
    start = coder.cfg.threshold_init
    level = DEFAULT_THRESHOLD if start is None else start
    return {"threshold": nn.Parameter(torch.full((coder.d_sae,), level))}


def _gated_own(coder: SparseCoder) -> dict[str, Tensor]:
    return {name: nn.Parameter(torch.zeros(coder.d_sae)) for name in ("r_mag", "b_mag")}


ACTIVATIONS: dict[str, Activation] = {
    "topk": Activation(
        losses=("auxk",),
        saelens_architecture="topk",
        select=select_topk,
        encode=encode_topk,
        backward=backward_where_active,
    ),
    "batchtopk": Activation(
        losses=("auxk",),
        saelens_architecture="jumprelu",
        select=select_batchtopk,
        infer=above_threshold,
        own=_batchtopk_own,
        backward=backward_where_active,
    ),
    "jumprelu": Activation(
        losses=("sparsity", "auxk"),
        saelens_architecture="jumprelu",
        select=select_jumprelu,
        own=_jumprelu_own,
    ),
    "relu": Activation(
        losses=("sparsity", "auxk"), saelens_architecture="standard", select=select_relu
    ),
    "gated": Activation(
        losses=("sparsity", "gate", "auxk"),
        saelens_architecture="gated",
        select=select_gated,
        own=_gated_own,
    ),
    "matching_pursuit": Activation(
        losses=(), saelens_architecture="matching_pursuit", encode=encode_matching_pursuit
    ),
}
