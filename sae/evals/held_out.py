"""Evaluate a dictionary on the documents, or samples of a world, that its training never saw.

Which documents are held out follows from what they hold (`stream.documents`): a share that is no
larger than training's holds none that training saw, whatever else is read beside.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sae.config import Config
from sae.evals.company import as_null, require_one_process
from sae.evals.finishing import Keep
from sae.evals.null_rows import evals_of_nulls
from sae.evals.on_world import evaluate_on_world
from sae.evals.ranks import Ranks, first_goes_first
from sae.evals.registry import checked_names, chosen_names
from sae.evals.results import EvalResults, NullResult
from sae.evals.resuming import NOTHING, settings_of, with_nulls
from sae.evals.run import ALL_BUT_WORLD, Tell, evaluate
from sae.evals.twins import Twin, names_and_twins
from sae.stream.opening import open_model, pick_device, require_single
from sae.worlds import make_world

RULE = "blake2b(content) / 2^64 < held_out_fraction"


def evaluate_held_out(
    coder: Any,
    cfg: Config,
    tell: Tell = lambda *_: None,
    *,
    before: EvalResults = NOTHING,
    keep: Keep = lambda _: None,
) -> EvalResults:
    """Return what `cfg.eval` asks of `coder`, on the held-out documents of `cfg.data`, or on
    samples of `cfg.world`.

    The coder's metadata say which tokens its training left out for their norm; they are left out
    here too. Nulls are those of `cfg.eval.nulls`, which are all read before a model is opened.
    Evals of `before` (`resuming.finished_before`) are not run again; `keep` is given the results
    whenever an eval has finished.

    Errors: ValueError where documents would be among those that training saw.
    """
    if cfg.eval.evals is not None:
        checked_names(cfg.eval.evals)
    nulls, twins = names_and_twins(cfg, coder)
    require_one_process(Ranks.here(), (*nulls, *twins))
    asked = _Asked(cfg, nulls, twins, tell, {"settings": settings_of(cfg)}, before, keep)
    if cfg.world.name:
        return _on_world(coder, asked)
    documents = documents_of(coder.metadata, cfg)
    names = chosen_names(cfg.eval.evals, ALL_BUT_WORLD)
    before = with_nulls(before, names, (*nulls, *twins)) or NOTHING
    beside = {name: twin for name, twin in twins.items() if twin.model == cfg.model}
    about = {**asked.about, "documents": documents}
    found = _on_text(coder, replace(asked, twins=beside, about=about, before=before))
    of_other_models = {
        name: twin
        for name, twin in twins.items()
        if name not in beside and name not in before.nulls
    }
    measured = {
        name: _null_on_text(name, twin, cfg, tell) for name, twin in of_other_models.items()
    }
    return replace(found, nulls={**found.nulls, **measured})


@dataclass(frozen=True)
class _Asked:
    """What is asked of a dictionary on text as on a world."""

    cfg: Config
    nulls: tuple[str, ...]
    twins: Mapping[str, Twin]
    tell: Tell
    about: Mapping[str, Any]
    before: EvalResults = NOTHING
    keep: Keep = lambda _: None

    def on(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments that `evaluate` and `evaluate_on_world` share."""
        settings = self.cfg.eval
        return {
            "seed": settings.seed,
            "names": settings.evals,
            "settings": settings,
            "nulls": self.nulls,
            "twins": {name: twin.coder.to(device) for name, twin in self.twins.items()},
            "tell": self.tell,
            "about": self.about,
            "before": self.before,
            "keep": self.keep,
        }


def _on_text(coder: Any, asked: _Asked) -> EvalResults:
    cfg = asked.cfg
    alike = replace(cfg, run=replace(cfg.run, seed=cfg.eval.seed))
    with first_goes_first():
        opened = open_model(alike, pick_device(cfg.run.device))
    if cfg.coder.site == "sae":
        require_single(opened.hookpoints)
    about = {**asked.about, "reinitialised": cfg.model.reinitialised}
    return evaluate(
        coder.to(opened.lm.device),
        opened.held_out(),
        lm=opened.lm,
        hookpoint=opened.hookpoints,
        target=opened.targets or None,
        other=opened.other,
        tokens=cfg.eval.tokens,
        downstream_tokens=cfg.eval.downstream_tokens,
        max_norm=coder.metadata.get("max_norm"),
        **replace(asked, about=about).on(opened.lm.device),
    )


def _null_on_text(name: str, twin: Twin, cfg: Config, tell: Tell) -> NullResult:
    """Return what is found of a twin on its own model's activations, on the same documents."""
    names = chosen_names(cfg.eval.evals, ALL_BUT_WORLD)
    wanted, left_out = evals_of_nulls(names, cfg.eval)
    cfg = replace(cfg, model=twin.model, eval=replace(cfg.eval, evals=wanted))
    start = time.perf_counter()
    found = _on_text(twin.coder, _Asked(cfg, (), {}, tell, {}))
    return as_null(name, found, left_out, time.perf_counter() - start)


def documents_of(metadata: Mapping[str, Any], cfg: Config) -> dict[str, Any]:
    """Return from where the evaluated documents are, and whether training saw any of them.

    `disjoint_from_training` is None where it can't be known: the dictionary does not say what it
    was trained on, or that was another text and a smaller share of it was held out.

    Errors: ValueError where training saw some of them.
    """
    data, trained = cfg.data, metadata.get("held_out_fraction")
    wanted = data.held_out_fraction
    is_subset = trained is not None and wanted <= trained
    if trained is not None and not is_subset and metadata.get("dataset_path") == data.source:
        raise ValueError(
            "documents must be ones that training never saw; the dictionary's training held out "
            f"{trained:g} of {data.source!r}, and `data.held_out_fraction` {wanted:g} takes more. "
            f"Use at most {trained:g}."
        )
    return {
        "source": data.source,
        "subset": data.subset,
        "split": data.split,
        "held_out_fraction": wanted,
        "rule": RULE,
        "order_seed": cfg.eval.seed,
        "disjoint_from_training": True if is_subset else None,
    }


def _on_world(coder: Any, asked: _Asked) -> EvalResults:
    cfg = asked.cfg
    device = pick_device(cfg.run.device)
    world = make_world(cfg.world, device)
    return evaluate_on_world(coder.to(device), world, cfg.eval.tokens, **asked.on(device))
