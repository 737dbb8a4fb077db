"""A whole run: the sections together, and what they refuse of each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from .coder import CoderConfig
from .coder_rules import HAVE_K, SPARSITY_LOSSES
from .data import DataConfig
from .evaluation import EvalConfig, ReportConfig
from .fleet import FleetConfig
from .model import ModelConfig
from .rules import require
from .run import RunConfig
from .stream import HarvestConfig, StreamConfig
from .train import TrainConfig
from .world import WorldConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    coder: CoderConfig = field(default_factory=CoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    run: RunConfig = field(default_factory=RunConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    def __post_init__(self) -> None:
        require(
            self.train.sort_latents_every_steps is None
            or bool(self.coder.prefixes or self.coder.random_prefixes),
            "train.sort_latents_every_steps",
            "needs Matryoshka prefixes, whose latents it chooses",
            self.train.sort_latents_every_steps,
            "Give `coder.prefixes`, or leave it out.",
        )
        require(
            self.coder.activation != "matching_pursuit"
            or self.stream.normalisation not in ("standardise", "whiten"),
            "stream.normalisation",
            "must be none, mean_norm or layer_norm for matching_pursuit, whose encoder is its "
            "decoder",
            self.stream.normalisation,
            "Use mean_norm.",
        )
        require(
            not self.train.freeze_decoder or self.coder.activation != "matching_pursuit",
            "train.freeze_decoder",
            "must be off for matching_pursuit, whose decoder is its encoder",
            self.train.freeze_decoder,
            "Leave it out or choose another `coder.activation`.",
        )
        _require_schedules_fit(self)
        _require_site_fits(self)


def _require_site_fits(cfg: Config) -> None:
    """Refuse what names other places, or asks more, than the coder's site has."""
    site, names_target = cfg.coder.site, cfg.coder.site in ("transcoder", "cross_layer")
    if cfg.model.hookpoint:
        require(
            bool(cfg.model.target) == names_target,
            "model.target",
            "must name what is written for a transcoder and cross_layer, and be left out for an "
            f"sae and a crosscoder, here `coder.site: {site}`",
            cfg.model.target,
            "Give the module whose output is to be written, or choose `coder.site: transcoder`.",
        )
    require(
        cfg.model.other is None or not names_target,
        "model.other",
        f"must be left out for `coder.site: {site}`, which is of one model",
        cfg.model.other,
        "Leave it out or set `coder.site: crosscoder`.",
    )
    require(
        site == "sae" or cfg.stream.normalisation != "layer_norm",
        "stream.normalisation",
        f"must not be layer_norm for `coder.site: {site}`, which has no one token to undo it by",
        cfg.stream.normalisation,
        "Use mean_norm.",
    )
    require(
        not cfg.coder.tie_decoders or cfg.stream.normalisation in ("none", "mean_norm"),
        "stream.normalisation",
        "must be none or mean_norm for `coder.tie_decoders`, whose one decoder serves all layers",
        cfg.stream.normalisation,
        "Use mean_norm.",
    )
    require(
        site in ("sae", "crosscoder") or cfg.train.resample_every_tokens is None,
        "train.resample_every_tokens",
        f"must be left out for `coder.site: {site}`, whose latents do not write what they read",
        cfg.train.resample_every_tokens,
        "Leave it out; AuxK revives latents.",
    )
    require(
        not cfg.world.name or cfg.train.model_loss == "none",
        "train.model_loss",
        "needs a language model, which a world has not",
        cfg.train.model_loss,
        "Leave it out.",
    )
    require(
        not (cfg.world.name and site != "sae"),
        "coder.site",
        "must be sae on a world, which has one place",
        site,
        "Use `sae.fit` for rows of several places.",
    )


def _require_schedules_fit(cfg: Config) -> None:
    """Refuse schedules of what the coder does not have."""
    train, coder = cfg.train, cfg.coder
    require(
        train.k_start is None or coder.activation in HAVE_K,
        "train.k_start",
        f"is a setting of {', '.join(HAVE_K)}",
        coder.activation,
        "Leave it out or choose one of these as `coder.activation`.",
    )
    if train.k_start is not None and coder.d_sae is not None and train.k_start > coder.d_sae:
        raise ValueError(
            "`train.k_start` must be in [1, `coder.d_sae`]; got "
            f"k_start={train.k_start}, d_sae={coder.d_sae}. Lower it or raise `coder.d_sae`."
        )
    require(
        not train.sparsity_warmup_fraction or coder.activation in SPARSITY_LOSSES,
        "train.sparsity_warmup_fraction",
        f"is a setting of {', '.join(SPARSITY_LOSSES)}",
        coder.activation,
        "Leave it out, or use `train.k_start`.",
    )
    require(
        train.p_end is None or coder.sparsity_loss == "p_norm",
        "train.p_end",
        "needs `coder.sparsity_loss: p_norm`",
        coder.sparsity_loss,
        "Leave it out or choose that loss.",
    )
