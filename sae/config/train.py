"""The section `train`: the optimisation, and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .names import DecayName, ModelLossName, MomentFormat, OptimizerName
from .rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation, and what is kept of it."""

    tokens: int = 100_000_000
    """Activations the coder is trained on, over all processes, counting each reuse."""

    batch_tokens: int = 4096
    """Activations in one optimiser step, over all processes."""

    grad_accumulation_steps: int = 1
    """Backward passes that share one optimiser step; batch_tokens is divided among them."""

    optimizer: OptimizerName = "adam"
    """What turns gradients into updates: adam; muon, which orthogonalises a matrix's momentum, with
    Adam for vectors; signum, schedule-free sign descent, whose average is the dictionary."""

    lr: float | None = None
    """Peak learning rate; None: derived from the optimizer, d_sae and the number of steps."""

    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates for the first and second moment."""

    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly from 0 to lr."""

    decay_fraction: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls to 0."""

    lr_decay: DecayName | None = None
    """How the learning rate falls over decay_fraction; none holds it. None: linear, and none for
    signum, which averages in its place."""

    k_start: int | None = None
    """Active latents a token at the first step, from where they go linearly to `coder.k` (topk,
    batchtopk, matching_pursuit); None: `coder.k` from the start."""

    k_anneal_fraction: float = 0.1
    """Share of the steps, at the start, over which k goes from k_start to `coder.k`."""

    model_loss: ModelLossName = "none"
    """What the language model loses when it runs on what the coder writes, added to the losses: kl,
    its divergence from the clean model; ce, its next-token loss; none."""

    model_loss_fraction: float = 0.1
    """Share of the steps, at the end, that train with the model's loss; 1 trains end to end."""

    model_loss_weight: float | None = None
    """Weight of the model's loss; None: what makes it pull at x_hat `model_loss_pull` times as hard
    as the reconstruction does."""

    model_loss_pull: float = 4.0
    """How hard the model's loss pulls at x_hat where it has no weight of its own, as a multiple of
    the reconstruction's pull at the same tokens."""

    model_loss_lr_share: float = 0.125
    """Learning rate of the first step with the model's loss, from where it falls linearly to 0, as
    a share of lr; where all steps have that loss, they have the usual schedule."""

    model_loss_contexts: int = 8
    """Contexts on which a process takes the model's loss in one step, beside the step's batch."""

    reconstruction_weight: float = 1.0
    """Weight of the reconstruction's loss in steps with the model's loss; 0: the model's alone."""

    sparsity_warmup_fraction: float = 0.0
    """Share of the steps, at the start, over which the sparsity loss's weight rises linearly from
    0 (relu, gated, jumprelu)."""

    p_end: float | None = None
    """Exponent of the p_norm loss at the last step, in (0, 1], to which it falls linearly from 1
    once the warm-ups are over; None: 1 throughout."""

    ema_decay: float | None = None
    """Decay a step of a moving average of the weights, in [0, 1), which is then saved as the
    dictionary; None: the weights themselves are."""

    grad_clip_norm: float | None = None
    """Largest global norm of the gradient; None does not clip."""

    adam_moments: MomentFormat = "fp32"
    """What Adam keeps of a weight's gradients: 8, 4 or 2 bytes a weight; bf16 and 8bit round
    stochastically."""

    step: Literal["auto", "fused", "autograd"] = "auto"
    """How a training step is computed: fused does no more than the maths needs, autograd trains
    every coder; auto: fused where it can."""

    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Precision of the coder's matmuls; weights stay float32; auto: bf16 on GPUs that have it.
    The fused step on a CPU scores latents in bf16 and computes the strongest again in float32."""

    freeze_decoder: bool = False
    """Leave the decoder at the random directions that it starts from: a null dictionary, which only
    learns to read."""

    shuffle_dimensions: bool = False
    """Permute each dimension of the activations by itself, over a step's tokens: a null in which
    dimensions keep their values and lose all that they have in common."""

    dead_after_tokens: int | None = None
    """A latent is dead once it has not fired in this many tokens; None: the smaller of 10 million
    and a tenth of `train.tokens`."""

    dead_refresh_steps: int = 10
    """Steps between updates of the list of dead latents that AuxK trains."""

    resample_every_tokens: int | None = None
    """Tokens between resamplings, which give dead latents the directions of badly reconstructed
    activations; None: never."""

    resample_until_fraction: float = 0.5
    """Share of the steps after which nothing is resampled, so that all latents have time to learn;
    in (0, 1]."""

    sort_latents_every_steps: int | None = None
    """Steps between sortings of the latents by how often they fire, so that Matryoshka prefixes
    hold the commonest; None: never."""

    log_every_steps: int = 10
    """Steps between rows of metrics.jsonl; the only time that metrics are read from the device."""

    checkpoint_every_steps: int | None = None
    """Steps between checkpoints; None: a tenth of the run."""

    keep_checkpoints: int = 2
    """Newest checkpoints kept; older ones are removed."""

    resume: Literal["never", "auto"] = "never"
    """auto continues the newest checkpoint of `run.folder` and starts anew where there is none."""

    def __post_init__(self) -> None:
        require_positive(
            "train",
            self,
            "tokens",
            "batch_tokens",
            "grad_accumulation_steps",
            "lr",
            "grad_clip_norm",
            "dead_after_tokens",
            "dead_refresh_steps",
            "k_start",
            "p_end",
            "model_loss_weight",
            "model_loss_pull",
            "model_loss_lr_share",
            "model_loss_contexts",
            "resample_every_tokens",
            "resample_until_fraction",
            "sort_latents_every_steps",
            "log_every_steps",
            "checkpoint_every_steps",
            "keep_checkpoints",
        )
        require(
            self.tokens >= self.batch_tokens,
            "train.tokens",
            "must be at least train.batch_tokens",
            self.tokens,
            "Raise it or lower `train.batch_tokens`.",
        )
        require(
            all(0 <= beta < 1 for beta in self.adam_betas),
            "train.adam_betas",
            "must be two numbers in [0, 1)",
            self.adam_betas,
            "Use 0.9 and 0.999.",
        )
        require(
            self.optimizer == "adam" or self.adam_moments == "fp32",
            "train.adam_moments",
            f"must be fp32 where train.optimizer is {self.optimizer}",
            self.adam_moments,
            "Use `train.optimizer: adam`, or fp32.",
        )
        require(
            self.optimizer == "adam" or self.step != "fused",
            "train.step",
            f"must be autograd where train.optimizer is {self.optimizer}",
            self.step,
            "Use `train.step: autograd`, or adam.",
        )
        require(
            self.ema_decay is None or (0 <= self.ema_decay < 1 and self.optimizer != "signum"),
            "train.ema_decay",
            "must be in [0, 1), and left out for signum, whose dictionary is an average already",
            self.ema_decay,
            "Use 0.999, with adam or muon.",
        )
        for name in (
            "k_anneal_fraction",
            "sparsity_warmup_fraction",
            "model_loss_fraction",
            "resample_until_fraction",
            "p_end",
        ):
            value = getattr(self, name)
            require(
                value is None or 0 <= value <= 1,
                f"train.{name}",
                "must be in [0, 1]",
                value,
                "Give a share of 1.",
            )
        require(
            self.reconstruction_weight >= 0,
            "train.reconstruction_weight",
            "must not be negative",
            self.reconstruction_weight,
            "Use 1, or 0 to train by the model's loss alone.",
        )
        require(
            self.model_loss != "none" or self.reconstruction_weight == 1,
            "train.reconstruction_weight",
            "is for steps with a `train.model_loss`",
            self.reconstruction_weight,
            "Leave it out, or set `train.model_loss: kl`.",
        )
        require(
            self.reconstruction_weight > 0 or self.model_loss_weight is not None,
            "train.model_loss_weight",
            "must be given where the reconstruction, which it is balanced with, has no weight",
            self.model_loss_weight,
            "Use 1.",
        )
        require(
            not (self.freeze_decoder and (self.step == "fused" or self.resample_every_tokens)),
            "train.freeze_decoder",
            "must be off where the decoder is written by `train.step: fused` or resampling",
            self.freeze_decoder,
            "Use `train.step: autograd`, and no `train.resample_every_tokens`.",
        )
        shares = (self.warmup_fraction, self.decay_fraction)
        require(
            min(shares) >= 0 and sum(shares) <= 1,
            "train.warmup_fraction + train.decay_fraction",
            "must lie in [0, 1], each at least 0",
            shares,
            "Use 0.05 and 0.3.",
        )
