"""The named worlds: which settings each has, and their values.

Sources: synth_16k is SynthSAEBench-16k (arXiv 2602.14687), synth_1k the same with 1024 features;
matryoshka_toy the tree world of "Learning multi-level features with Matryoshka SAEs" (arXiv
2503.17547); toy_model "Toy models of superposition" (transformer-circuits.pub, 2022).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from sae.config import WorldConfig

SYNTH_16K: dict[str, Any] = {
    "seed": 42,
    "n_features": 16_384,
    "d_in": 768,
    "directions": "near_orthogonal",
    "orthogonal_steps": 100,
    "orthogonal_lr": 3e-4,
    "bias_norm": 0.5,
    "norm_spread": 0.0,
    "probabilities": None,
    "zipf_exponent": 0.5,
    "rarest": 5e-4,
    "commonest": 0.4,
    "correlation_rank": 25,
    "correlation_scale": 0.1,
    "trees": 128,
    "branching": 4,
    "depth": 3,
    "exclusive_share": 1.0,
    "compensated": True,
    "scaled_by_parent": True,
    "first_magnitude": 5.0,
    "last_magnitude": 4.0,
    "magnitude_sd": 0.5,
    "magnitude_sd_spread": 0.5,
}
# Of three exclusive children each fires with 0.2 under its parent and none with 0.4, where each
# would by itself fire with 1 − 0.4^(1/3) and one of those is drawn.
OF_THREE = 1 - 0.4 ** (1 / 3)
MATRYOSHKA_TOY: dict[str, Any] = SYNTH_16K | {
    "n_features": 20,
    "d_in": 20,
    "directions": "orthonormal",
    "bias_norm": 0.0,
    "norm_spread": 0.05,
    "probabilities": (0.15,) * 3 + (OF_THREE,) * 9 + (0.05,) * 8,
    "zipf_exponent": None,
    "rarest": None,
    "commonest": None,
    "correlation_rank": 0,
    "correlation_scale": 0.0,
    "trees": 3,
    "branching": 3,
    "depth": 1,
    "compensated": False,
    "scaled_by_parent": False,
    "first_magnitude": 1.0,
    "last_magnitude": 1.0,
    "magnitude_sd": 0.0,
    "magnitude_sd_spread": 0.0,
}
TOY_MODEL: dict[str, Any] = {
    "seed": 42,
    "n_features": 5,
    "d_in": 2,
    "sparsity": 0.9,
    "importance": 0.9,
    "toy_steps": 1000,
}
ZIPF = ["zipf_exponent", "rarest", "commonest"]
PRESETS: dict[str, dict[str, Any]] = {
    "synth_16k": SYNTH_16K,
    "synth_1k": SYNTH_16K | {"n_features": 1024, "d_in": 256, "trees": 8},
    "matryoshka_toy": MATRYOSHKA_TOY,
    "toy_model": TOY_MODEL,
}


def resolve_world(cfg: WorldConfig) -> WorldConfig:
    """Return `cfg` with the values of its preset where it has none.

    Errors: ValueError for a setting that this world does not have, and for values that do not go
    together.
    """
    given = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name != "name"}
    given = {name: value for name, value in given.items() if value is not None}
    if not cfg.name:
        if given:
            raise ValueError(
                f"`world.{next(iter(given))}` needs a world; `world.name` is empty. Give "
                f"`world.name`, one of {list(PRESETS)}."
            )
        return cfg
    preset = PRESETS[cfg.name]
    for name in given:
        if name not in preset:
            raise ValueError(
                f"`world.{name}` must be left out for {cfg.name}, which has no such setting; got "
                f"{given[name]!r}. It has {', '.join(preset)}."
            )
    resolved = replace(cfg, **_merged(preset, given))
    _require_consistent(resolved)
    return resolved


def _merged(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return a preset with what is given; probabilities and Zipf's law replace each other."""
    law = [name for name in ZIPF if name in given]
    if law and "probabilities" in given:
        raise ValueError(
            f"`world.probabilities` must be left out where `world.{law[0]}` is given; got both. "
            "Give one of the two."
        )
    overruled = ["probabilities"] if law else ZIPF if "probabilities" in given else []
    return preset | dict.fromkeys(overruled) | given


def _require_consistent(cfg: WorldConfig) -> None:
    """Refuse values that are fine by themselves and impossible together."""
    p = cfg.probabilities
    if p is not None and len(p) not in (1, cfg.n_features):
        raise ValueError(
            f"`world.probabilities` must be one for all or one for each of {cfg.n_features} "
            f"features; got {len(p)}. Give as many as `world.n_features`."
        )
    missing = [name for name in ZIPF if getattr(cfg, name) is None]
    if cfg.name != "toy_model" and p is None and missing:
        raise ValueError(
            f"`world.{missing[0]}` must be given where `world.probabilities` is not; it is None. "
            f"Zipf's law needs {', '.join(ZIPF)}."
        )
    if cfg.rarest is not None and cfg.commonest is not None and cfg.rarest > cfg.commonest:
        raise ValueError(
            f"`world.rarest` must be at most `world.commonest`; got {cfg.rarest} and "
            f"{cfg.commonest}. Exchange them."
        )
    if cfg.trees is not None and cfg.n_features is not None and cfg.trees > cfg.n_features:
        raise ValueError(
            f"`world.trees` must be at most `world.n_features`; got {cfg.trees} and "
            f"{cfg.n_features}. Lower it."
        )
