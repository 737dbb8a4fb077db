"""From a `WorldConfig` to the world it means."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.config import WorldConfig
from sae.worlds.features import Features, draw_factor, make_features, zipf
from sae.worlds.firing import Firing
from sae.worlds.forest import Forest, compensated, grow_forest
from sae.worlds.geometry import draw_bias, draw_directions
from sae.worlds.presets import resolve_world
from sae.worlds.toy_model import train_toy_model
from sae.worlds.world import World

# A feature of a toy model whose column is shorter than this share of the longest was given up; the
# little that is left of it is left out of the world.
REPRESENTED = 0.5


def make_world(cfg: WorldConfig, device: torch.device | str = "cpu") -> World:
    """Return the world that `cfg` names, its tensors on `device`.

    The same `cfg` gives the same world on every device, to rounding: all is drawn on the CPU.

    Errors: ValueError for settings that do not fit the world or each other, or name none.
    """
    if not cfg.name:
        raise ValueError("`world.name` must name a world; it is empty. Give it, such as synth_1k.")
    cfg = resolve_world(cfg)
    if cfg.name == "toy_model":
        return _toy_world(cfg, device)
    return _superposition(cfg, device)


def _superposition(cfg: WorldConfig, device: torch.device | str) -> World:
    """Return a world of sparse linear superposition.

    The seeds' offsets, and the order of draws, are those of the benchmark's generator, so that its
    worlds come out as they are there and scores can be compared.
    """
    assert cfg.n_features is not None
    assert cfg.d_in is not None
    assert cfg.seed is not None
    shape = _generator(cfg.seed)
    directions = draw_directions(
        cfg.directions or "random",
        cfg.n_features,
        cfg.d_in,
        steps=cfg.orthogonal_steps or 0,
        lr=cfg.orthogonal_lr or 0.0,
        generator=shape,
        device=device,
    )
    bias = draw_bias(cfg.d_in, cfg.bias_norm or 0.0, shape)
    forest = grow_forest(
        cfg.n_features,
        trees=cfg.trees or 0,
        branching=cfg.branching or 0,
        depth=cfg.depth or 0,
        exclusive_share=cfg.exclusive_share or 0.0,
        generator=_generator(cfg.seed + 3),
    )
    features = _features(cfg, forest).to(device)
    firing = Firing(features, forest.to(device), bool(cfg.scaled_by_parent))
    return World(cfg, directions, bias.to(device), firing)


def _features(cfg: WorldConfig, forest: Forest) -> Features:
    n, seed = cfg.n_features or 0, cfg.seed or 0
    probability = _probabilities(cfg)
    if cfg.compensated:
        probability = compensated(probability, forest)
    sd = torch.randn(n, generator=_generator(seed + 1)) * (cfg.magnitude_sd_spread or 0.0)
    norms = torch.randn(n, generator=_generator(seed + 5)) * (cfg.norm_spread or 0.0)
    return make_features(
        probability,
        factor=draw_factor(
            *(n, cfg.correlation_rank or 0, cfg.correlation_scale or 0.0), _generator(seed + 4)
        ),
        mean=torch.linspace(cfg.first_magnitude or 0.0, cfg.last_magnitude or 0.0, n),
        sd=(sd + (cfg.magnitude_sd or 0.0)).abs(),
        norm=(1 + norms).clamp(min=0.01),
    )


def _probabilities(cfg: WorldConfig) -> Tensor:
    n = cfg.n_features or 0
    if cfg.probabilities is not None:
        return torch.tensor(cfg.probabilities).expand(n)
    return zipf(
        n,
        exponent=cfg.zipf_exponent or 0.0,
        rarest=cfg.rarest or 0.0,
        commonest=cfg.commonest or 0.0,
    )


def _toy_world(cfg: WorldConfig, device: torch.device | str) -> World:
    """Return the hidden activations W f of a trained toy model, over the features that it kept."""
    assert cfg.sparsity is not None
    toy = train_toy_model(
        cfg.n_features or 0,
        cfg.d_in or 0,
        sparsity=cfg.sparsity,
        importance=cfg.importance or 1.0,
        steps=cfg.toy_steps or 0,
        seed=cfg.seed or 0,
    )
    norms = toy.weight.norm(dim=0)
    is_kept = norms > REPRESENTED * norms.max()
    norms = norms[is_kept]
    n = len(norms)
    features = make_features(
        torch.full((n,), 1 - cfg.sparsity),
        factor=torch.zeros(n, 0),
        mean=torch.full((n,), 0.5),
        sd=torch.zeros(n),
        norm=norms,
        is_uniform=True,
    ).to(device)
    alone = grow_forest(
        n, trees=0, branching=0, depth=0, exclusive_share=0.0, generator=_generator(0)
    )
    directions = (toy.weight[:, is_kept] / norms).T.contiguous().to(device)
    bias = torch.zeros(directions.shape[1], device=device)
    return World(cfg, directions, bias, Firing(features, alone.to(device), False))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
