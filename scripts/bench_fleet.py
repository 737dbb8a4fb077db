"""Measure a fleet against its members one after the other, each with its own stream, in one run.

    python scripts/bench_fleet.py                          # eight coders, rows from memory
    python scripts/bench_fleet.py --activations shards/my  # harvested ones
    python scripts/bench_fleet.py --gflop-per-token 0.1    # a forward's cost is paid for each token
    python scripts/bench_fleet.py --out docs/benchmarks    # and keep the figures, with the machine

A round is one training step of every coder: in sequence each coder takes a batch of its own stream
and steps, in the fleet all step on one batch. Rounds of both alternate, each half of them first, so
that what else the machine does hits both alike; ratios are of neighbouring rounds. The stream is
rows in host memory, drawn in a shuffled order, normalised, on the device; where they come from a
model, `--gflop-per-token` (2 · the parameters below the hookpoint · 1e-9, divided by
`stream.reuse`) is paid in matmuls. Its share of the time is printed, as all depends on it.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from benchmarking import machine
from benchmarking.results import free_path
from torch import Tensor

from sae.coder.sites import Sites
from sae.config import Config
from sae.configuration import from_flat
from sae.files import write_json, write_text
from sae.stream.arrays import open_source
from sae.stream.opening import pick_device
from sae.train.distributed import make_accelerator
from sae.train.fleet_groups import Trainee, make_groups
from sae.train.run import resolve
from sae.train.side_by_side import SideBySide
from sae.train.state import TrainState
from sae.train.trainer import make_state

BURN_WIDTH = 1024
LR = 1e-4


@dataclass(frozen=True)
class Contender:
    """One way to train the coders.

    crews: each takes its steps on a stream of its own. seconds: of its rounds.
    """

    name: str
    crews: Sequence[SideBySide]
    seconds: list[float]


class Stream:
    """Batches in training units, and the time that they took.

    With `gflop` a token, as many floating-point operations are spent on each as a model would.
    """

    def __init__(self, gflop: float, device: torch.device):
        self.device, self.seconds = device, 0.0
        self.rows_burnt = gflop * 1e9 / (2 * BURN_WIDTH**2)  # rows through a square matrix a token
        self.square = torch.randn(BURN_WIDTH, BURN_WIDTH, device=device) / BURN_WIDTH**0.5

    def batch(self, state: TrainState, n: int) -> Tensor:
        """Return the next n rows of a state's source, in training units."""
        start = now(self.device)
        if rows := round(n * self.rows_burnt):
            torch.mm(torch.ones(rows, BURN_WIDTH, device=self.device), self.square)
        raw = state.source.next_batch(n).to(self.device)
        x = state.calibration.normaliser.apply(raw)
        self.seconds += now(self.device) - start
        return x


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the benchmark; return the figures that it prints."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device("auto")
    cfg = configuration(options)
    accelerator = make_accelerator(cfg.run, cfg.train)
    rows = options.activations or harvested_like(options.rows, options.d)
    alone = [trainees(cfg, rows, accelerator, [seed])[0] for seed in range(options.coders)]
    fleet = trainees(cfg, rows, accelerator, range(options.coders))
    contenders = (
        Contender("in sequence", [crew_of([trainee], accelerator) for trainee in alone], []),
        Contender("as a fleet", [crew_of(fleet, accelerator)], []),
    )
    stream = Stream(options.gflop_per_token, device)
    for number in range(options.rounds + 1):
        for contender in contenders if number % 2 else reversed(contenders):
            contender.seconds.append(one_round(contender, stream, options.batch, device))
        if number == 0:  # warm-up
            stream.seconds = 0.0
            for contender in contenders:
                contender.seconds.clear()
    n_streams = sum(len(contender.crews) for contender in contenders)
    batch_seconds = stream.seconds / (options.rounds * n_streams)
    figures = figures_of(contenders, batch_seconds)
    document = document_of(options, device, contenders, figures)
    print(as_markdown(document))
    if options.out:
        path = free_path(options.out, f"{document['date']}-{machine.slug(device)}-fleet")
        write_json(path, document)
        write_text(path.with_suffix(".md"), as_markdown(document))
        print(f"Written: {path} and {path.with_suffix('.md').name}")
    return figures


def configuration(options: argparse.Namespace) -> Config:
    """Return the configuration of one coder."""
    return from_flat(
        {
            "coder.d_sae": options.d_sae,
            "coder.k": options.k,
            "train.lr": LR,
            "train.tokens": 10_000 * options.batch,
            "train.batch_tokens": options.batch,
            "train.step": "fused",
        }
    )


def harvested_like(n: int, d: int) -> Tensor:
    """Return rows as a harvest holds them: float16, in host memory; of 64 directions and noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, d, generator=generator)
    strengths = torch.rand(n, 64, generator=generator).pow(8)
    return (strengths @ directions + 0.1 * torch.randn(n, d, generator=generator)).half()


def trainees(
    cfg: Config, rows: Tensor | str, accelerator: Accelerator, seeds: Sequence[int]
) -> list[Trainee]:
    """Return coders on one stream that differ in their seeds."""
    source = open_source(rows)
    cfg = resolve(cfg, Sites(source.widths), None, accelerator.device)
    found: list[Trainee] = []
    for seed in seeds:
        own = from_flat({"run.seed": seed}, cfg)
        calibration = found[0].state.calibration if found else None
        state = make_state(own, source, accelerator, calibration)
        found.append(Trainee(f"seed{seed}", own, state, place=0))
    return found


def crew_of(some: Sequence[Trainee], accelerator: Accelerator) -> SideBySide:
    """Return what trains coders on one stream."""
    return SideBySide(make_groups(some, accelerator), accelerator.device)


def one_round(contender: Contender, stream: Stream, n: int, device: torch.device) -> float:
    """Return the seconds of one step of every coder, the batches included."""
    start = now(device)
    for crew in contender.crews:
        crew.train({0: [stream.batch(crew.groups[0].trainees[0].state, n)]})
    return now(device) - start


def now(device: torch.device) -> float:
    """Return the time once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def figures_of(contenders: Sequence[Contender], batch_seconds: float) -> dict[str, float]:
    """Return medians in seconds, and the quartiles of the ratio of neighbouring rounds."""
    sequence, fleet = (contender.seconds for contender in contenders)
    ratios = sorted(b / a for a, b in zip(sequence, fleet, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    medians = [statistics.median(c.seconds) for c in contenders]
    shares = [
        len(c.crews) * batch_seconds / median for c, median in zip(contenders, medians, strict=True)
    ]
    return {
        "sequence_seconds": medians[0],
        "fleet_seconds": medians[1],
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "sequence_stream_share": shares[0],
        "fleet_stream_share": shares[1],
    }


def document_of(
    options: argparse.Namespace,
    device: torch.device,
    contenders: Sequence[Contender],
    figures: dict[str, float],
) -> dict[str, Any]:
    """Return machine, shape and figures."""
    names = ("coders", "batch", "d", "d_sae", "k", "rounds", "gflop_per_token")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python scripts/bench_fleet.py", *sys.argv[1:]]),
        "machine": machine.describe(device, options.commit),
        "load_averages": [round(value, 2) for value in os.getloadavg()],
        "shape": {name: getattr(options, name) for name in names},
        "seconds_a_round": {c.name: [round(s, 4) for s in c.seconds] for c in contenders},
        **figures,
    }


def as_markdown(document: dict[str, Any]) -> str:
    """Return the document as a page."""
    about, shape = document["machine"], document["shape"]
    versions = ", ".join(f"{name} {v}" for name, v in about["packages"].items() if v)
    changes = ", with uncommitted changes" if about["uncommitted_changes"] else ""
    load = ", ".join(f"{value:.2f}" for value in document["load_averages"])
    lines = [
        f"# A fleet on {about['device']}, {document['date']}",
        "",
        f"```\n{document['command']}\n```",
        "",
        f"- commit: {about['commit']}{changes}",
        f"- versions: python {about['python']}, {versions}",
        f"- CPU threads: {about['cpu_threads']}; load averages at the end {load}",
        f"- {shape['coders']} coders, n {shape['batch']}, d {shape['d']}, d_sae {shape['d_sae']}, "
        f"k {shape['k']}; {shape['rounds']} rounds; {shape['gflop_per_token']} GFLOP a token",
        f"- ratio {document['ratio']:.3f} (quartiles {document['ratio_low']:.3f} to "
        f"{document['ratio_high']:.3f})",
        "",
        "| | ms a round | stream |",
        "|---|---:|---:|",
    ]
    for name, key in zip(document["seconds_a_round"], ("sequence", "fleet"), strict=True):
        share, seconds = document[f"{key}_stream_share"], document[f"{key}_seconds"]
        lines.append(f"| {name} | {seconds * 1e3:.1f} | {share:.1%} |")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coders", type=int, default=8)
    parser.add_argument("--d", type=int, default=576, help="width, where rows are made")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096, help="tokens a step")
    parser.add_argument("--rows", type=int, default=131_072, help="rows in memory")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--activations", help="a file or a harvest in place of made rows")
    parser.add_argument("--gflop-per-token", type=float, default=0.0, help="a forward's cost")
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON and Markdown")
    parser.add_argument("--commit", help="the commit to note, where there is no git repository")
    return parser


if __name__ == "__main__":
    main()
