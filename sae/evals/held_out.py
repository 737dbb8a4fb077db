"""Evaluate a dictionary on the documents, or samples of a world, that its training never saw."""

from __future__ import annotations

from typing import Any

from sae.config import Config
from sae.evals.on_world import evaluate_on_world
from sae.evals.registry import checked_names
from sae.evals.results import EvalResults
from sae.evals.run import Tell, evaluate
from sae.stream.opening import open_model, pick_device, require_single
from sae.worlds import make_world


def evaluate_held_out(coder: Any, cfg: Config, tell: Tell = lambda *_: None) -> EvalResults:
    """Return what `cfg.eval` asks of `coder`, on the held-out documents of `cfg.data`, or on
    samples of `cfg.world`.

    The coder's metadata say which tokens its training left out for their norm; they are left out
    here too.
    """
    if cfg.eval.evals is not None:
        checked_names(cfg.eval.evals)
    if cfg.world.name:
        return _on_world(coder, cfg, tell)
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
        tell=tell,
    )


def _on_world(coder: Any, cfg: Config, tell: Tell) -> EvalResults:
    device = pick_device(cfg.run.device)
    return evaluate_on_world(
        coder.to(device),
        make_world(cfg.world, device),
        cfg.eval.tokens,
        seed=cfg.run.seed,
        names=cfg.eval.evals,
        settings=cfg.eval,
        tell=tell,
    )
