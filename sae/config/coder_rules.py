"""Which settings of a coder go together, and which are for some activations or sites only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from .names import SiteName, SparsityLossName
from .rules import require

if TYPE_CHECKING:
    from .coder import CoderConfig


def require_fits(coder: CoderConfig, d_sae: int) -> None:
    """Refuse numbers of latents that a dictionary of `d_sae` does not have."""
    for name in ("k", "multi_k", "target_l0"):
        value = getattr(coder, name)
        if value is not None and value > d_sae and (name != "k" or coder.activation in HAVE_K):
            raise ValueError(
                f"`coder.{name}` must be in [1, `coder.d_sae`]; got {name}={value}, "
                f"d_sae={d_sae}. Lower `coder.{name}` or raise `coder.d_sae`."
            )
    ends = (0, *coder.prefixes, d_sae)
    if coder.prefixes and any(low >= high for low, high in pairwise(ends)):
        raise ValueError(
            "`coder.prefixes` must increase and lie in [1, `coder.d_sae` − 1]; got "
            f"{list(coder.prefixes)}, d_sae={d_sae}. The whole dictionary is added by itself."
        )
    if coder.random_prefixes >= d_sae:
        raise ValueError(
            "`coder.random_prefixes` must be below `coder.d_sae`; got "
            f"{coder.random_prefixes}, d_sae={d_sae}. Use about 8."
        )


# Which activations a setting is for, where it is not for all.
HAVE_K = ("topk", "batchtopk", "matching_pursuit")
SPARSITY_LOSSES: dict[str, tuple[SparsityLossName, ...]] = {
    "relu": ("l1", "p_norm", "tanh"),
    "gated": ("l1", "p_norm", "tanh"),
    "jumprelu": ("step", "tanh", "quadratic"),
}
ONLY_FOR = {
    "signed": ("topk",),
    "multi_k": ("topk",),
    "sparsity_loss": tuple(SPARSITY_LOSSES),
    "sparsity_coefficient": tuple(SPARSITY_LOSSES),
    "target_l0": tuple(SPARSITY_LOSSES),
    "threshold_init": ("jumprelu",),
    "ste_to_encoder": ("jumprelu",),
    "dead_penalty": tuple(SPARSITY_LOSSES),
    "refine_step": ("topk", "batchtopk", "jumprelu", "relu", "gated"),
    "k_aux": ("topk", "batchtopk", "jumprelu", "relu", "gated"),
}
# The same for settings that have a value of their own: whoever gives one for another activation is
# warned. They are not refused, as every run folder holds them.
IDLE_BUT_FOR = {
    "k": HAVE_K,
    "multi_k_coefficient": ("topk",),
    "threshold_rate": ("batchtopk",),
    "bandwidth": ("jumprelu",),
    "tanh_scale": tuple(SPARSITY_LOSSES),
}


def require_coherent(coder: CoderConfig) -> None:
    """Refuse settings that make no sense together, or do nothing for the activation."""
    for name, activations in ONLY_FOR.items():
        _require_among(coder, name, "activation", activations, _instead(name))
    losses = SPARSITY_LOSSES.get(coder.activation, ())
    require(
        coder.sparsity_loss is None or coder.sparsity_loss in losses,
        "coder.sparsity_loss",
        f"must be one of {', '.join(losses)} for {coder.activation}",
        coder.sparsity_loss,
        "Choose one of these.",
    )
    require(
        coder.activation != "jumprelu"
        or coder.target_l0 is None
        or coder.sparsity_loss in (None, "quadratic"),
        "coder.sparsity_loss",
        "must be quadratic for jumprelu with a `coder.target_l0`: a weight alone cannot raise L0",
        coder.sparsity_loss,
        "Leave one of the two out.",
    )
    require(
        coder.sparsity_loss != "quadratic" or coder.target_l0 is not None,
        "coder.target_l0",
        "must be given with `coder.sparsity_loss: quadratic`",
        coder.target_l0,
        "Give the L0 you want.",
    )
    require(
        not (coder.prefixes and coder.random_prefixes),
        "coder.random_prefixes",
        "must be 0 where `coder.prefixes` are given",
        coder.random_prefixes,
        "Give one of the two.",
    )
    require(
        not coder.detach_prefixes or bool(coder.prefixes or coder.random_prefixes),
        "coder.detach_prefixes",
        "needs prefixes",
        coder.detach_prefixes,
        "Give `coder.prefixes` or `coder.random_prefixes`.",
    )
    require(
        coder.multi_k is None or coder.multi_k > coder.k,
        "coder.multi_k",
        "must be above `coder.k`",
        coder.multi_k,
        "Use 4 · k.",
    )
    require(
        not (coder.multi_k and coder.refine_step),
        "coder.multi_k",
        "must be left out where `coder.refine_step` is given",
        coder.multi_k,
        "Choose one of the two.",
    )


# Which sites a setting is for, where it is not for all.
SITES_FOR: dict[str, tuple[SiteName, ...]] = {
    "skip": ("transcoder",),
    "tie_decoders": ("cross_layer",),
    "refine_step": ("sae", "crosscoder"),
    "prefixes": ("sae", "transcoder", "crosscoder"),
    "random_prefixes": ("sae", "transcoder", "crosscoder"),
    "multi_k": ("sae", "crosscoder"),
}


def require_for_site(coder: CoderConfig) -> None:
    """Refuse what a coder of another place, or of several, has no meaning for."""
    for name, sites in SITES_FOR.items():
        _require_among(coder, name, "site", sites)
    require(
        coder.activation != "matching_pursuit" or coder.site in ("sae", "crosscoder"),
        "coder.activation",
        f"must be another one for `coder.site: {coder.site}`: matching pursuit takes away, row by "
        "row, what it writes from what it reads",
        coder.activation,
        "Use topk.",
    )


def _require_among(
    coder: CoderConfig, name: str, kind: str, among: Sequence[str], instead: str = ""
) -> None:
    """Refuse a setting that is given to a coder whose activation or site (`kind`) has none."""
    given = getattr(coder, kind)
    require(
        not getattr(coder, name) or given in among,
        f"coder.{name}",
        f"is a setting of {', '.join(among)}",
        given,
        f"Leave it out or choose one of these as `coder.{kind}`{instead}.",
    )


def _instead(name: str) -> str:
    return " (topk and batchtopk: `coder.k` is their L0)" if name == "target_l0" else ""
