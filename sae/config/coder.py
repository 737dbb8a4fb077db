"""The section `coder`: the dictionary itself. What its settings refuse is in `coder_rules`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .coder_rules import require_coherent, require_fits, require_for_site
from .names import ActivationName, SiteName, SparsityLossName
from .rules import require, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class CoderConfig:
    """The dictionary: its width, its activation function, its losses, its start."""

    d_sae: int | None = None
    """Number of latents; None: expansion_factor · d_in."""

    expansion_factor: int | None = None
    """d_sae / d_in, used where d_sae is None; None: 8."""

    site: SiteName = "sae"
    """What is read and written: sae, one place; transcoder, from `model.hookpoint` to
    `model.target`; crosscoder, several places or two models with one code; cross_layer, from
    several layers, each latent to its own layer's target and to all later ones."""

    skip: bool = False
    """Add a learned affine map of what is read to what is written (transcoder)."""

    tie_decoders: bool = False
    """Let a latent write the same to every layer that it writes to (cross_layer)."""

    activation: ActivationName = "topk"
    """The sparsifying activation function."""

    k: int = 32
    """Active latents a token (topk, matching_pursuit), or on average (batchtopk)."""

    signed: bool = False
    """Select latents by magnitude and let them be negative (topk)."""

    threshold_rate: float = 0.02
    """Share by which the running threshold, which stands for the batch once training is over, moves
    to each batch's own (batchtopk), in (0, 1]."""

    sparsity_loss: SparsityLossName | None = None
    """What a code is made sparse by: l1, p_norm or tanh (relu, gated), step, tanh or quadratic
    (jumprelu); None: l1, step, and quadratic where jumprelu has a `target_l0`."""

    sparsity_coefficient: float | None = None
    """Weight of the sparsity loss; None: 0.1 (l1, p_norm), 0.001 (tanh, step), 1 (quadratic)."""

    tanh_scale: float = 4.0
    """Factor on latents inside the tanh loss."""

    target_l0: float | None = None
    """Active latents a token that training aims at: by moving the sparsity loss's weight (relu,
    gated), or inside the quadratic loss (jumprelu), which needs it. None: the weight stays."""

    bandwidth: float = 0.05
    """Width of the straight-through window around a threshold, in training units (jumprelu)."""

    threshold_init: float | None = None
    """Thresholds before the first step, in training units (jumprelu); None: what lets `target_l0`
    latents through on the calibration sample, or 0.1 without a target."""

    ste_to_encoder: bool = False
    """Let the straight-through gradient reach the encoder too, not the thresholds alone
    (jumprelu)."""

    prefixes: tuple[int, ...] = ()
    """Numbers of first latents that must reconstruct on their own (Matryoshka), increasing; the
    whole dictionary is always the last. Empty: no Matryoshka."""

    random_prefixes: int = 0
    """Prefixes drawn anew at each step, in place of fixed ones, short ones more often; 0: none."""

    detach_prefixes: bool = False
    """Let a prefix train only the latents that the one before it lacks; the whole trains all."""

    multi_k: int | None = None
    """Active latents in a second reconstruction, which trains those just below the k-th too (topk);
    None: no second one."""

    multi_k_coefficient: float = 0.125
    """Weight of the second reconstruction's loss."""

    refine_step: float = 0.0
    """Step size of one refinement: what a first code leaves over is encoded again and added; 0
    encodes once."""

    tilt: float = 0.0
    """How much more badly reconstructed tokens count, as the exponent's factor on a token's loss in
    units of the mean; 0 counts all alike."""

    k_aux: int | None = None
    """Dead latents that reconstruct the residual in AuxK; None: d_in / 2 (topk, batchtopk), else 0;
    0: no AuxK."""

    aux_coefficient: float = 0.03125
    """Weight of AuxK's share of unexplained residual."""

    dead_penalty: float = 0.0
    """Weight of the pre-activation loss, by which dead latents rise to their thresholds (jumprelu,
    relu, gated); 0: none."""

    b_dec_init: Literal["geometric_median", "mean", "zeros"] = "geometric_median"
    """What b_dec starts from, computed on the calibration sample."""

    def __post_init__(self) -> None:
        require(
            self.d_sae is None or self.expansion_factor is None,
            "coder.expansion_factor",
            "must be left out where coder.d_sae is given",
            self.expansion_factor,
            "Give one of the two.",
        )
        require_positive(
            "coder", self, "d_sae", "expansion_factor", "target_l0", "multi_k", "tanh_scale"
        )
        require_positive("coder", self, "bandwidth")
        require(self.k >= 1, "coder.k", "must be in [1, `coder.d_sae`]", self.k, "Raise `coder.k`.")
        require(
            0 < self.threshold_rate <= 1,
            "coder.threshold_rate",
            "must be in (0, 1]",
            self.threshold_rate,
            "Use 0.02.",
        )
        may_be_off = (
            *("sparsity_coefficient", "aux_coefficient", "dead_penalty", "multi_k_coefficient"),
            *("k_aux", "random_prefixes", "refine_step", "threshold_init", "tilt"),
        )
        require_not_negative("coder", self, "Use 0 to turn it off.", *may_be_off)
        if self.d_sae is not None:
            require_fits(self, self.d_sae)
        require_coherent(self)
        require_for_site(self)
