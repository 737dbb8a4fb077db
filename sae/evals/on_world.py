"""Evaluate a coder on a world whose features are known, on rows that no training draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.config import EvalConfig, EvalName
from sae.evals.company import Company, require_one_process
from sae.evals.evaluable import Evaluable
from sae.evals.fingerprint import dictionary_digest
from sae.evals.finishing import Clock, Finishing, Keep
from sae.evals.interface import EvalSetup, Reads
from sae.evals.provenance import versions
from sae.evals.ranks import Ranks
from sae.evals.registry import EVALS, chosen_names
from sae.evals.results import EvalResults, plain_json
from sae.evals.resuming import with_nulls
from sae.evals.run import Tell, start_evals
from sae.evals.shared import Shared
from sae.evals.truth import (
    BLOCK_ROWS,
    as_contexts,
    family_pairs,
    frequent_features,
    truth_of,
)
from sae.evals.walk import ON_ROWS, Walk
from sae.worlds.seeds import evaluation_generator

if TYPE_CHECKING:
    from sae.worlds.world import World

READABLE: tuple[Reads, ...] = ("weights", "activations", "world")
__all__ = ["evaluate_on_world", "family_pairs", "frequent_features", "truth_of"]


@torch.no_grad()
def evaluate_on_world(
    coder: Any,
    world: World,
    n_rows: int = 65_536,
    *,
    seed: int = 0,
    names: Iterable[str] | None = None,
    pairs: Tensor | None = None,
    n_resamples: int = 1000,
    settings: EvalConfig | None = None,
    nulls: Iterable[str] = (),
    twins: Mapping[str, Any] | None = None,
    tell: Tell = lambda *_: None,
    about: Mapping[str, Any] | None = None,
    before: EvalResults | None = None,
    keep: Keep = lambda _: None,
) -> EvalResults:
    """Return what the evals `names` say of `coder` on `n_rows` samples of `world`.

    Of several processes (`ranks.join_ranks`) the first returns it, from what all evaluated.

    Args:
        coder: anything with encode (or encode_sparse) and decode.
        seed: of the rows and of the bootstrap.
        names: rows of EVALS, or sets of them; None: all that take less than minutes, but those that
            read a language model's text.
        pairs: (p, 2) int64, parent and child features; None: those of the world's trees.
        settings: what evals ask beyond that; None: the defaults.
        nulls: names of `null_rows.NULLS`, the oracle among them, measured on the same rows.
        twins: dictionaries of the same world to measure beside it, by name.
        tell: told (stage, rows done, n_rows) after every block.
        about, before, keep: as for `evaluate`.

    Errors: ValueError for a wrong name, an eval that needs a language model, no rows, a coder
    whose width is not the world's, and reconstructions that are not finite.
    """
    names = _wanted_names(names)
    if n_rows < 1:
        raise ValueError(f"`n_rows` must be at least 1; got {n_rows}. Give some ten thousand.")
    ready = Evaluable(coder, world.d_in, "the world")
    ranks, clock = Ranks.here(), Clock()
    beside = (*nulls, *(twins or {}))
    require_one_process(ranks, beside)
    finishing = Finishing(clock, ranks, with_nulls(before, names, beside), keep)
    left = finishing.left(names)
    if not left:
        return finishing.results
    truth = truth_of(ready, world, pairs)
    settings = settings or EvalConfig()
    setup = EvalSetup(ready.d_out, ready.d_sae, seed, n_resamples, truth, ready, settings)
    company = Company(setup, left, world=world, pairs=pairs, nulls=nulls, twins=twins)
    shared = Shared(ready.d_in)
    walk = Walk(ready, start_evals(left, ON_ROWS, setup), clock=clock, shared=shared)
    generator = evaluation_generator(seed, world.directions.device)
    for number, start in enumerate(range(0, n_rows, BLOCK_ROWS)):
        n = min(BLOCK_ROWS, n_rows - start)
        with clock.timed("world"):
            contexts = as_contexts(world.sample(n, generator), start)
        if ranks.takes(number):
            walk.add(contexts)
        company.add(contexts)
        tell("rows", start + n, n_rows)
    walk.finish()
    company.finish()
    shared = shared.over(ranks)
    origin = _origin(ready, shared, clock, world, setup) | dict(about or {})
    finishing.finish(start_evals(left, ("weights",), setup) | walk.evals, origin, shared.arrays())
    return replace(finishing.results, nulls={**finishing.results.nulls, **company.results()})


def _wanted_names(names: Iterable[str] | None) -> tuple[EvalName, ...]:
    wanted = chosen_names(names, READABLE)
    for name in wanted:
        if EVALS[name].reads not in READABLE:
            raise ValueError(
                f"the eval {name!r} reads a language model's text; a world has none. Leave it out."
            )
    return wanted


def _origin(
    coder: Evaluable, shared: Shared, clock: Clock, world: Any, setup: EvalSetup
) -> dict[str, Any]:
    """Return what the numbers were made from and with."""
    cfg = getattr(world, "cfg", None)
    settings = {} if cfg is None else asdict(cfg)
    seen, seconds = shared.seen, clock.seconds
    return {
        "coder": plain_json(coder.metadata),
        "dictionary": dictionary_digest(coder.coder),
        "d_in": setup.d_in,
        "d_sae": setup.d_sae,
        "l0": shared.l0,
        "model": None,
        "hookpoint": None,
        "world": {key: value for key, value in settings.items() if value is not None},
        "n_tokens": seen.n_tokens,
        "n_documents": seen.n_documents,
        "evaluated": str(shared.digest),
        "seed": setup.seed,
        "n_resamples": setup.n_resamples,
        "seconds": {name: seconds.get(name, 0.0) for name in ("world", "coder")},
        **versions(),
    }
