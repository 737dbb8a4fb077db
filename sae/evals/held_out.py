"""Evaluate a dictionary on the documents, or samples of a world, that its training never saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sae.config import Config
from sae.evals.company import as_null
from sae.evals.null_rows import evals_of_nulls
from sae.evals.on_world import evaluate_on_world
from sae.evals.registry import checked_names, chosen_names
from sae.evals.results import EvalResults, NullResult
from sae.evals.run import ALL_BUT_WORLD, Tell, evaluate
from sae.evals.twins import Twin, names_and_twins
from sae.stream.opening import open_model, pick_device, require_single
from sae.worlds import make_world


def evaluate_held_out(coder: Any, cfg: Config, tell: Tell = lambda *_: None) -> EvalResults:
    """Return what `cfg.eval` asks of `coder`, on the held-out documents of `cfg.data`, or on
    samples of `cfg.world`.

    The coder's metadata say which tokens its training left out for their norm; they are left out
    here too. Nulls are those of `cfg.eval.nulls`, which are all read before a model is opened.
    """
    if cfg.eval.evals is not None:
        checked_names(cfg.eval.evals)
    nulls, twins = names_and_twins(cfg, coder)
    if cfg.world.name:
        return _on_world(coder, cfg, nulls, twins, tell)
    beside = {name: twin for name, twin in twins.items() if twin.model == cfg.model}
    found = _on_text(coder, cfg, nulls, beside, tell)
    of_other_models = {name: twin for name, twin in twins.items() if name not in beside}
    measured = {
        name: _null_on_text(name, twin, cfg, tell) for name, twin in of_other_models.items()
    }
    return replace(found, nulls={**found.nulls, **measured})


def _on_text(
    coder: Any, cfg: Config, nulls: tuple[str, ...], twins: Mapping[str, Twin], tell: Tell
) -> EvalResults:
    opened = open_model(cfg, pick_device(cfg.run.device))
    if cfg.coder.site == "sae":
        require_single(opened.hookpoints)
    return evaluate(
        coder.to(opened.lm.device),
        opened.held_out(),
        lm=opened.lm,
        hookpoint=opened.hookpoints,
        target=opened.targets or None,
        other=opened.other,
        names=cfg.eval.evals,
        tokens=cfg.eval.tokens,
        downstream_tokens=cfg.eval.downstream_tokens,
        max_norm=coder.metadata.get("max_norm"),
        seed=cfg.run.seed,
        settings=cfg.eval,
        nulls=nulls,
        twins={name: twin.coder.to(opened.lm.device) for name, twin in twins.items()},
        tell=tell,
    )


def _null_on_text(name: str, twin: Twin, cfg: Config, tell: Tell) -> NullResult:
    """Return what is found of a twin on its own model's activations, on the same documents."""
    names = chosen_names(cfg.eval.evals, ALL_BUT_WORLD)
    wanted, left_out = evals_of_nulls(names, cfg.eval)
    cfg = replace(cfg, model=twin.model, eval=replace(cfg.eval, evals=wanted))
    return as_null(name, _on_text(twin.coder, cfg, (), {}, tell), left_out)


def _on_world(
    coder: Any, cfg: Config, nulls: tuple[str, ...], twins: Mapping[str, Twin], tell: Tell
) -> EvalResults:
    device = pick_device(cfg.run.device)
    return evaluate_on_world(
        coder.to(device),
        make_world(cfg.world, device),
        cfg.eval.tokens,
        seed=cfg.run.seed,
        names=cfg.eval.evals,
        settings=cfg.eval,
        nulls=nulls,
        twins={name: twin.coder.to(device) for name, twin in twins.items()},
        tell=tell,
    )
