"""Compare coders on a language model: trained on the same shards, measured on held-out documents.

    python scripts/bench_language_model.py --shards shards/quickstart
    python scripts/bench_language_model.py --configs configs/smollm2/jumprelu.yaml --seeds 0 1

Every configuration is trained for every seed, saved, loaded and measured. The shards are written
first where the folder is not there; all configurations must read what they hold. Runs that the JSON
already has are skipped: the same command goes on after a stop.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from benchmarking import machine
from benchmarking.coder_table import page

import sae
from sae.config import Config
from sae.configuration import from_command_line
from sae.evals.held_out import evaluate_held_out
from sae.files import read_json, write_json, write_text
from sae.stream.harvest import harvest
from sae.train import run

CONFIGS = machine.ROOT / "configs"
MEASURED = ("reconstruction", "sparsity", "downstream")  # what the table shows


def main(arguments: Sequence[str] | None = None) -> Path:
    """Train and measure what is missing; return the path of the JSON."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    date = datetime.now(UTC).date().isoformat()
    path = options.out or machine.ROOT / "docs/benchmarks" / f"{date}-cpu-smollm2.json"
    document = read_json(path) if path.exists() else _blank(date)
    for seed in options.seeds:
        for config in options.configs:
            name = config.stem if config.stem != "quickstart" else "topk"
            if any((row["coder"], row["seed"]) == (name, seed) for row in document["rows"]):
                continue
            cfg = configured(config, options, seed)
            _require_shards(cfg, options.shards)
            document["rows"].append({"coder": name, "seed": seed, **measured(cfg)})
            write_json(path, document)
            write_text(path.with_suffix(".md"), page(document))
            print(document["rows"][-1], flush=True)
    print(f"\n{page(document)}\nWritten: {path}")
    return path


def configured(config: Path, options: argparse.Namespace, seed: int) -> Config:
    """Return a configuration that reads the shards."""
    settings = {"run.seed": str(seed), "stream.shards": str(options.shards)}
    settings |= dict(word.split("=", 1) for word in options.set)
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    flags += ["--eval.evals", *MEASURED]
    return from_command_line([str(config), *flags], "bench_language_model")


def measured(cfg: Config) -> dict[str, Any]:
    """Train once and return what the saved dictionary is worth."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        kept = run(replace(cfg, run=replace(cfg.run, folder=f"{folder}/run")))
        seconds = time.monotonic() - start
        coder = sae.load(kept)
    results = evaluate_held_out(coder, cfg)
    return {"seconds": seconds, "metrics": dict(results.metrics)}


def _require_shards(cfg: Config, folder: Path) -> None:
    """Write what a run reads, unless it is there; `--set harvest.tokens=…` asks for more."""
    if folder.exists():
        return
    # A harvest ends within a forward pass of what is asked for, and outlying norms are left out.
    slack = 2 * cfg.stream.sequences_per_forward * cfg.data.context_size
    needed = -(-cfg.train.tokens // cfg.stream.reuse) + cfg.stream.reserved_tokens + slack
    tokens = cfg.harvest.tokens or needed
    live = replace(cfg, stream=replace(cfg.stream, shards=None))
    harvest(replace(live, harvest=replace(cfg.harvest, folder=str(folder), tokens=tokens)))


def _blank(date: str) -> dict[str, Any]:
    return {
        "date": date,
        "command": f"python scripts/bench_language_model.py {shlex.join(sys.argv[1:])}".rstrip(),
        "machine": machine.describe(torch.device("cpu"), None),
        "rows": [],
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = [CONFIGS / "quickstart.yaml", *sorted((CONFIGS / "smollm2").glob("*.yaml"))]
    parser.add_argument("--configs", type=Path, nargs="+", default=files)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shards", type=Path, default=Path("shards/quickstart"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--out", type=Path, help="the JSON; default: docs/benchmarks/, by date")
    options = parser.parse_args(arguments)
    if bad := [word for word in options.set if "=" not in word]:
        parser.error(f"`--set` must be KEY=VALUE; got {bad[0]!r}.")
    return options


if __name__ == "__main__":
    main()
