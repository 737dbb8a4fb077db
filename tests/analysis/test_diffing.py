"""Telling shared latents from those of one place: planted in two layers, and in two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

import sae
from sae.analysis import PlacesOfLatents, places_of_latents
from sae.coder import SparseCoder
from sae.coder.sites import Sites
from sae.config import CoderConfig
from sae.configuration import from_flat
from sae.train import run

SHARED, ALONE = 12, 6
N_FEATURES = SHARED + 2 * ALONE
D_SAE = 36  # some more, so that none is left without a latent
PLANTED = torch.tensor([0] * SHARED + [1] * ALONE + [2] * ALONE)


def planted_directions(d: int, seed: int = 0) -> Tensor:
    """Unit directions (2, features, d) of two places; 0 where a feature is not of the place."""
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(2, N_FEATURES, d, generator=generator), dim=2)
    directions[1, PLANTED == 1] = 0
    directions[0, PLANTED == 2] = 0
    return directions


def planted_codes(n: int) -> Tensor:
    """Codes (n, features) of which about two fire, independently: their number varies, so that no
    constant can take up part of them."""
    generator = torch.Generator().manual_seed(1)
    shape = (n, N_FEATURES)
    fires = torch.rand(shape, generator=generator) < 0.08
    return fires * (1 + 0.3 * torch.randn(shape, generator=generator)).clamp_min(0.1)


def kinds(places: PlacesOfLatents) -> Tensor:
    """0 for shared latents, 1 and 2 for those of the first and the second place alone."""
    alone = torch.where(places.is_of[0], 1, 2)
    return torch.where(places.is_exclusive, alone, 0)


def share_told_rightly(coder: SparseCoder, directions: Tensor) -> float:
    """The share of planted features that have a latent in their direction, told as their kind."""
    factors = coder.metadata["site_factors"]
    parts = coder.W_dec.split(list(coder.sites.written_widths), 1)
    found = torch.cat([f * part for f, part in zip(factors, parts, strict=True)], 1)  # pyright: ignore
    truth = normalize(torch.cat([*directions], 1), dim=1)
    cosines, nearest = (normalize(found, dim=1) @ truth.T).max(0)
    is_right = kinds(places_of_latents(coder))[nearest] == PLANTED
    return (is_right & (cosines > 0.9)).float().mean().item()


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": "batchtopk", "k": 2},
        {"activation": "relu", "sparsity_coefficient": 0.05, "step": "autograd"},
    ],
    ids=["batchtopk", "l1"],
)
def test_planted_features_of_two_layers_are_told_rightly(settings: dict[str, Any]):
    """The second layer is three times as large: shares are of training's units."""
    directions = planted_directions(24)
    codes = planted_codes(30_000)
    coder = sae.fit(
        [codes @ directions[0], 3 * (codes @ directions[1])],
        site="crosscoder",
        d_sae=D_SAE,
        tokens=200_000,
        batch_tokens=512,
        lr=5e-3,
        progress=False,
        **settings,
    )
    assert share_told_rightly(coder, directions) >= 0.95


@pytest.fixture
def planted_pair(tiny_lm_folder: Path, tmp_path: Path) -> tuple[list[Path], Tensor]:
    """Two copies of the tiny model whose tokens' embeddings are sums of planted features."""
    directions = planted_directions(32)
    codes = planted_codes(300)
    folders = []
    for name, rows in zip(("one", "other"), directions, strict=True):
        folder = tmp_path / name
        shutil.copytree(tiny_lm_folder, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"] = codes @ rows
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    return folders, directions


def test_planted_features_of_two_models_are_told_rightly(
    planted_pair: tuple[list[Path], Tensor], tmp_path: Path
):
    (one, other), directions = planted_pair
    tokens = torch.randint(3, 300, (400, 64), generator=torch.Generator().manual_seed(3))
    text = tmp_path / "tokens.jsonl"
    text.write_text("\n".join(json.dumps({"tokens": row}) for row in tokens.tolist()))
    folder = run(
        from_flat(
            {
                "model.name": str(one),
                "model.other": str(other),
                "model.hookpoint": "model.embed_tokens",
                "model.dtype": "float32",
                "data.source": str(text),
                "data.content": "tokens",
                "data.context_size": 64,
                "stream.buffer_tokens": 8192,
                "coder.site": "crosscoder",
                "coder.activation": "batchtopk",
                "coder.d_sae": D_SAE,
                "coder.k": 2,
                "train.tokens": 200_000,
                "train.batch_tokens": 512,
                "train.lr": 5e-3,
                "run.folder": str(tmp_path / "run"),
            }
        )
    )
    coder = sae.load(folder)
    assert share_told_rightly(coder, directions) >= 0.95
    assert places_of_latents(coder).names == ("model.embed_tokens", "other/model.embed_tokens")


@pytest.fixture
def coder() -> SparseCoder:
    """Four latents of three places: of all, of the first two, of the last, of the first mostly."""
    sites = Sites((2, 2, 2))
    cfg = CoderConfig(site="crosscoder", d_sae=4, k=1)
    coder = SparseCoder.create(6, cfg, sites=sites, metadata={"hook_name": "a,b,c"})
    norms = torch.tensor([[3.0, 4.0, 0.0, 5.0], [3.0, 4.0, 0.1, 0.9], [3.0, 0.0, 4.0, 0.0]])
    with torch.no_grad():
        coder.W_dec.zero_()
        coder.W_dec[:, ::2] = norms.T
    return coder


def test_counts_and_lists(coder: SparseCoder):
    places = places_of_latents(coder)
    assert places.names == ("a", "b", "c")
    torch.testing.assert_close(places.shares.sum(0), torch.ones(4))
    assert places.is_shared.tolist() == [True, False, False, False]
    assert places.is_exclusive.tolist() == [False, False, True, True]
    assert places.exclusive_to(0).tolist() == [3]
    assert places.exclusive_to(2).tolist() == [2]
    counts = {"shared by all": 1, "of several": 1, "a alone": 1, "b alone": 0, "c alone": 1}
    assert places.counts() == counts
    fires = torch.tensor([True, True, False, False])
    assert places.counts(fires) == {**counts, "a alone": 0, "c alone": 0}
    # A lower bound lets the last latent's weak part count.
    assert places_of_latents(coder, 0.1).is_exclusive.tolist() == [False, False, True, False]


def test_factors_of_training_count(coder: SparseCoder):
    """The saved dictionary's norms are in raw units: places of other scales are made equal."""
    coder.metadata["site_factors"] = [1.0, 1.0, 100.0]
    assert places_of_latents(coder).exclusive_to(2).tolist() == [2, 0]


def test_a_coder_of_one_place_and_a_wrong_bound_are_refused(coder: SparseCoder):
    with pytest.raises(ValueError, match=r"written at several places .* site is sae"):
        places_of_latents(SparseCoder.create(4, CoderConfig(d_sae=8, k=1)))
    with pytest.raises(ValueError, match=r"`least` must be in \(0, 1\]; got 0"):
        places_of_latents(coder, 0.0)
