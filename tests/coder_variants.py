"""One small coder of every kind, for the tests that hold for all of them."""

from __future__ import annotations

from typing import Any

import torch

from sae.coder import SparseCoder
from sae.config import CoderConfig

# Settings by name; the first of each activation bears its name.
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"activation": "topk"},
    "signed": {"activation": "topk", "signed": True},
    "multi_topk": {"activation": "topk", "multi_k": 12},
    "refined_topk": {"activation": "topk", "refine_step": 0.3},
    "batchtopk": {"activation": "batchtopk"},
    "matryoshka": {"activation": "batchtopk", "prefixes": (4, 11)},
    "refined": {
        "activation": "batchtopk",
        "refine_step": 0.3,
        "prefixes": (4, 11),
        "detach_prefixes": True,
        "tilt": 0.002,
    },
    "jumprelu": {"activation": "jumprelu"},
    "jumprelu_tanh": {"activation": "jumprelu", "sparsity_loss": "tanh", "ste_to_encoder": True},
    "jumprelu_quadratic": {
        "activation": "jumprelu",
        "sparsity_loss": "quadratic",
        "target_l0": 3.0,
        "k_aux": 4,
    },
    "relu": {"activation": "relu"},
    "relu_p_norm": {"activation": "relu", "sparsity_loss": "p_norm", "target_l0": 3.0},
    "relu_tanh": {"activation": "relu", "sparsity_loss": "tanh", "refine_step": 0.3},
    "gated": {"activation": "gated"},
    "matryoshka_gated": {"activation": "gated", "prefixes": (4, 11)},
    "matching_pursuit": {"activation": "matching_pursuit"},
    "matryoshka_pursuit": {"activation": "matching_pursuit", "prefixes": (4, 11)},
}
# What SAELens' layout can say: neither a refinement nor negative latents.
OPEN_TO_SAELENS = [
    name
    for name, settings in VARIANTS.items()
    if not settings.get("refine_step") and not settings.get("signed")
]


def make_variant(name: str, *, d_in: int, d_sae: int, k: int, seed: int = 1) -> SparseCoder:
    """Return an untrained coder whose every tensor is some way from where it starts."""
    cfg = CoderConfig(d_sae=d_sae, k=k, **VARIANTS[name])
    coder = SparseCoder.create(d_in, cfg, seed=seed, metadata={"hook_name": "model.layers.1"})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for buffer in ("threshold", "first_threshold"):
            if hasattr(coder, buffer):
                getattr(coder, buffer).copy_(0.2 + 0.3 * torch.rand(d_sae, generator=generator))
    return coder
