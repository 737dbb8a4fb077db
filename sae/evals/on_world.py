"""Evaluate a coder on a world whose features are known, on rows that no training draws."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.config import EvalConfig, EvalName
from sae.evals.evaluable import Evaluable
from sae.evals.interface import EvalSetup, Reads
from sae.evals.provenance import versions
from sae.evals.registry import EVALS, chosen_names
from sae.evals.results import EvalResults, plain_json
from sae.evals.run import Clock, Evals, Shared, Tell, results_of, start_evals
from sae.evals.truth import Truth, TruthBatch
from sae.worlds.seeds import evaluation_generator

if TYPE_CHECKING:
    from sae.worlds.world import World

READABLE: tuple[Reads, ...] = ("weights", "activations", "world")
BLOCK_ROWS = 1024
FREQUENCY_ROWS = 16_384


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
    tell: Tell = lambda *_: None,
) -> EvalResults:
    """Return what the evals `names` say of `coder` on `n_rows` samples of `world`.

    Args:
        coder: anything with encode (or encode_sparse) and decode.
        seed: of the rows and of the bootstrap.
        names: rows of EVALS, or sets of them; None: all that take less than minutes, but those that
            read a language model's text.
        pairs: (p, 2) int64, parent and child features; None: those of the world's trees.
        settings: what evals ask beyond that; None: the defaults.
        tell: told (stage, rows done, n_rows) after every block.

    Errors: ValueError for a wrong name, an eval that needs a language model, no rows, a coder
    whose width is not the world's, and reconstructions that are not finite.
    """
    names = _wanted_names(names)
    if n_rows < 1:
        raise ValueError(f"`n_rows` must be at least 1; got {n_rows}. Give some ten thousand.")
    ready = Evaluable(coder, world.d_in, "the world")
    truth = truth_of(ready, world, pairs)
    settings = settings or EvalConfig()
    setup = EvalSetup(ready.d_out, ready.d_sae, seed, n_resamples, truth, ready, settings)
    on_weights = start_evals(names, "weights", setup)
    evals = start_evals(names, "activations", setup) | start_evals(names, "world", setup)
    walk = _Walk(ready, evals, Shared(ready.d_in), Clock())
    generator = evaluation_generator(seed, world.directions.device)
    for start in range(0, n_rows, BLOCK_ROWS):
        n = min(BLOCK_ROWS, n_rows - start)
        with walk.clock.timed("world"):
            sample = world.sample(n, generator)
        walk.add(sample.x, sample.codes, start)
        tell("rows", start + n, n_rows)
    return results_of(on_weights | evals, walk.clock, _origin(walk, world, setup))


def truth_of(coder: Evaluable, world: World, pairs: Tensor | None = None) -> Truth:
    """Return what the ground truth's eval must know of `world` and of the dictionary."""
    return Truth(
        directions=world.directions.cpu(),
        bias=world.bias.cpu(),
        decoder=coder.directions().cpu(),
        frequent=frequent_features(world, coder.d_sae),
        pairs=family_pairs(world) if pairs is None else pairs,
    )


def frequent_features(world: World, n_wanted: int) -> Tensor:
    """Return the `n_wanted` features (or all) that fire most, (≤ n_wanted) int64, by rank.

    Counted on rows of their own, so that they are the same for all dictionaries of a width.
    """
    generator = evaluation_generator(-1, world.directions.device)
    counts = torch.zeros(world.n_features, dtype=torch.int64)
    for start in range(0, FREQUENCY_ROWS, BLOCK_ROWS):
        n = min(BLOCK_ROWS, FREQUENCY_ROWS - start)
        counts += (world.sample(n, generator).codes > 0).sum(0).cpu()
    return counts.argsort(descending=True, stable=True)[:n_wanted]


def family_pairs(world: Any) -> Tensor:
    """Return the world's parents and children as (p, 2) int64; p is 0 where it has no trees."""
    forest = getattr(getattr(world, "firing", None), "forest", None)
    if forest is None:
        return torch.zeros(0, 2, dtype=torch.int64)
    parent = forest.parent.cpu()
    children = (parent >= 0).nonzero()[:, 0]
    return torch.stack([parent[children], children], 1)


@dataclass(frozen=True)
class _Walk:
    """Rows on their way through coder and evals."""

    coder: Evaluable
    evals: Evals
    shared: Shared
    clock: Clock

    def add(self, x: Tensor, codes: Tensor, first: int) -> None:
        """Feed rows x (n, d_in) with codes (n, n_features), numbered from `first`."""
        numbers = torch.arange(first, first + len(x), device=x.device)
        for rows in self.coder.chunks(len(x)):
            if hasattr(self.coder.coder, "see"):
                self.coder.coder.see(codes[rows])
            with self.clock.timed("coder"):
                latents, x_hat = self.coder.encode_decode(x[rows])
            tokens = torch.zeros_like(numbers[rows])
            batch = TruthBatch(x[rows], x_hat, latents, tokens, numbers[rows], codes[rows])
            self.shared.update(batch)
            for name, accumulator in self.evals.items():
                with self.clock.timed(name):
                    accumulator.update(batch)


def _wanted_names(names: Iterable[str] | None) -> tuple[EvalName, ...]:
    wanted = chosen_names(names, READABLE)
    for name in wanted:
        if EVALS[name].reads not in READABLE:
            raise ValueError(
                f"the eval {name!r} reads a language model's text; a world has none. Leave it out."
            )
    return wanted


def _origin(walk: _Walk, world: Any, setup: EvalSetup) -> dict[str, Any]:
    """Return what the numbers were made from and with."""
    cfg = getattr(world, "cfg", None)
    settings = {} if cfg is None else asdict(cfg)
    seen, seconds = walk.shared.seen, walk.clock.seconds
    return {
        "coder": plain_json(walk.coder.metadata),
        "d_in": setup.d_in,
        "d_sae": setup.d_sae,
        "l0": walk.shared.l0,
        "model": None,
        "hookpoint": None,
        "world": {key: value for key, value in settings.items() if value is not None},
        "n_tokens": seen.n_tokens,
        "n_documents": seen.n_documents,
        "seed": setup.seed,
        "n_resamples": setup.n_resamples,
        "seconds": {name: seconds.get(name, 0.0) for name in ("world", "coder")},
        **versions(),
    }
