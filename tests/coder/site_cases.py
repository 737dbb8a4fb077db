"""One small coder of every site with every activation that it works with, for tests that hold for
all of them."""

from __future__ import annotations

from typing import Any

import torch
from coder_variants import VARIANTS
from torch import Tensor

from sae.coder import SparseCoder
from sae.coder.sites import Sites
from sae.config import SITES_FOR, CoderConfig

WIDTHS: dict[str, tuple[int, ...]] = {
    "transcoder": (5, 7),
    "skip": (5, 7),
    "crosscoder": (5, 7, 4),
    "cross_layer": (6,) * 6,
    "tied": (6,) * 6,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "transcoder": {"site": "transcoder"},
    "skip": {"site": "transcoder", "skip": True},
    "crosscoder": {"site": "crosscoder"},
    "cross_layer": {"site": "cross_layer"},
    "tied": {"site": "cross_layer", "tie_decoders": True},
}
D_SAE = 24


def works_with(site: str, variant: str) -> bool:
    """Say whether the configuration allows a variant at a site."""
    settings, kind = VARIANTS[variant], SETTINGS[site]["site"]
    refused = [
        name for name, sites in SITES_FOR.items() if settings.get(name) and kind not in sites
    ]
    return not refused and (settings["activation"] != "matching_pursuit" or kind == "crosscoder")


CASES = [(site, name) for site in SETTINGS for name in VARIANTS if works_with(site, name)]


def config(site: str, variant: str, **settings: Any) -> CoderConfig:
    return CoderConfig(
        **{"d_sae": D_SAE, "k": 4, **VARIANTS[variant], **SETTINGS[site], **settings}
    )


def sites(site: str) -> Sites:
    return Sites.of(CoderConfig(**SETTINGS[site]), WIDTHS[site])


def make(site: str, variant: str, **settings: Any) -> SparseCoder:
    """Return an untrained coder whose every tensor is some way from where it starts."""
    of = sites(site)
    coder = SparseCoder.create(of.d_in, config(site, variant, **settings), seed=1, sites=of)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name in ("threshold", "first_threshold"):
            if hasattr(coder, name):
                getattr(coder, name).copy_(0.2 * torch.rand(coder.d_sae, generator=generator))
        if coder.n_layers and not coder.cfg.tie_decoders:
            from sae.coder.cross_layer import hold_

            hold_(coder.W_dec, coder.n_layers)
    return coder


def rows(site: str, n: int = 64, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, sum(WIDTHS[site]), generator=generator)
