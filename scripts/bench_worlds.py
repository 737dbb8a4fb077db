"""Compare what trainers find of a world's features: our recipes, sae-lens, and the nulls.

    python scripts/bench_worlds.py --recipes topk "sae-lens batchtopk" nulls --seeds 0 1 2
    python scripts/bench_worlds.py --recipes topk --samples 1000000 --set train.lr=1e-3
    python scripts/bench_worlds.py --recipes metrics     # what metrics make of truth and nulls
    python scripts/bench_worlds.py --device cuda --world synth_16k --recipes "ours, 16k"
    python scripts/bench_worlds.py --merge a.json b.json --out c.json

Runs that are in the JSON already are skipped: the same command goes on after a stop, and processes
with different --recipes and --out can share the work and be merged. sae-lens trains only where the
package is installed; where it is not, its row says so.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarking import machine, world_results
from benchmarking.rows import Absent
from benchmarking.world_runs import (
    BASE,
    METRICS,
    NULLS,
    PEERS,
    RECIPES,
    RECIPES_16K,
    Task,
    train,
)

from sae.cli import is_ours
from sae.config import WorldConfig
from sae.configuration import flatten, from_flat
from sae.evals import evaluate_on_world
from sae.files import read_json
from sae.worlds import make_world

GROUPS = {
    "ours": RECIPES,
    "ours, 16k": RECIPES_16K,
    "sae-lens": PEERS,
    "nulls": NULLS,
    "metrics": METRICS,
}
BY_DEFAULT = ("ours", "sae-lens", "nulls")
PEER_PACKAGES = ("sae-lens",)
EVALUATION_SEED = 0


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the comparison; return the path of its JSON."""
    parser = _parser()
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    date = datetime.now(UTC).date().isoformat()
    folder = machine.ROOT / "docs" / "benchmarks"
    device = torch.device(options.device)
    of = f"{machine.slug(device)}-{options.world.replace('_', '-')}"
    path = options.out or folder / f"{date}-{of}.json"
    try:
        if options.merge:
            document = world_results.merged([read_json(given) for given in options.merge])
        else:
            recipes = chosen(options.recipes)
            document = world_results.open_document(path, _blank(options, date))
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if not options.merge:
        _run_all(path, document, recipes, options)
    world_results.save(path, document)
    print(f"\n{world_results.page(document)}\nWritten: {path} and {path.with_suffix('.md').name}")
    return path


def chosen(names: Sequence[str]) -> list[str]:
    """Return the recipes that names and groups mean; ValueError for an unknown one."""
    known = [name for group in GROUPS.values() for name in group]
    found = [name for given in names for name in GROUPS.get(given, (given,))]
    for name in found:
        if name not in known:
            raise ValueError(f"`--recipes` must be among {[*GROUPS, *known]}; got {name!r}.")
    return list(dict.fromkeys(found))


def given(words: Sequence[str]) -> dict[str, Any]:
    """Return the settings of KEY=VALUE words; ValueError for another word."""
    bad = [word for word in words if "=" not in word]
    if bad:
        raise ValueError(f"`--set` must be KEY=VALUE; got {bad[0]!r}.")
    return {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in words)}


def base_with(words: Sequence[str]) -> dict[str, Any]:
    """Return BASE with KEY=VALUE words over it, as the configuration's types have them."""
    asked = {**BASE, **given(words)}
    resolved = flatten(from_flat(asked))
    return {key: resolved[key] for key in asked}


def _run_all(
    path: Path, document: dict[str, Any], recipes: list[str], options: argparse.Namespace
) -> None:
    world = make_world(WorldConfig(name=options.world), options.device)
    for seed in options.seeds:
        for recipe in recipes:
            if world_results.is_done(document, recipe, seed):
                print(f"{recipe}, seed {seed}: there already", flush=True)
                continue
            row = run(
                recipe,
                Task(
                    world, options.samples, seed, document["base"], given(options.set), options.keep
                ),
                options.rows,
                options.evals,
            )
            world_results.add(document, row)
            world_results.save(path, document)
            print(world_results.one_line(row), flush=True)


def run(recipe: str, task: Task, n_rows: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure once; a run that cannot be says why in its row."""
    row: dict[str, Any] = {"recipe": recipe, "seed": task.seed}
    try:
        trained = train(recipe, task)
    except (Absent, ValueError, TypeError) as error:
        if not (isinstance(error, Absent) or is_ours(error)):
            raise  # a fault, and no refusal
        return {**row, "reason": f"{type(error).__name__}: {error}"}
    results = evaluate_on_world(
        trained.coder, task.world, n_rows, seed=EVALUATION_SEED, names=names
    )
    rate = task.samples / trained.seconds if trained.seconds else None
    return {
        **row,
        "seconds": trained.seconds or None,
        "data_seconds": trained.data_seconds or None,
        "samples_per_second": rate,
        "load": list(os.getloadavg()),
        **trained.facts,
        "metrics": dict(results.metrics),
        "undefined": dict(results.undefined),
    }


def _blank(options: argparse.Namespace, date: str) -> dict[str, Any]:
    found = machine.describe(torch.device(options.device), options.commit)
    packages = {name: machine.package_version(name) for name in PEER_PACKAGES}
    found["packages"] = {**found["packages"], **packages}  # type: ignore[dict-item]
    return {
        "date": date,
        "command": f"python scripts/bench_worlds.py {shlex.join(sys.argv[1:])}".rstrip(),
        "machine": found,
        "world": {"name": options.world},
        "samples": options.samples,
        "rows_evaluated": options.rows,
        "base": base_with(options.set),
        "rows": [],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipes", nargs="+", default=list(BY_DEFAULT), help=f"names, or {', '.join(GROUPS)}"
    )
    parser.add_argument("--world", default="synth_1k", help="a named world (synth_1k)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(cpu)")
    parser.add_argument("--samples", type=int, default=10_000_000, help="samples a run is given")
    parser.add_argument("--rows", type=int, default=102_400, help="fresh samples it is measured on")
    parser.add_argument("--evals", nargs="+", help="names or sets, as of `sae eval` (its own)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all recipes"
    )
    parser.add_argument(
        "--keep", type=Path, help="a folder for trained dictionaries, found there by the next call"
    )
    parser.add_argument("--out", type=Path, help="the JSON; default: docs/benchmarks/, by date")
    parser.add_argument("--merge", type=Path, nargs="+", help="only join results into --out")
    parser.add_argument("--commit", help="the commit, where the code is not in its git repository")
    return parser


if __name__ == "__main__":
    main()
