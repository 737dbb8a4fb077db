"""Every word that a setting accepts where it accepts words."""

from __future__ import annotations

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
