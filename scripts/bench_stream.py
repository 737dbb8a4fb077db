"""Measure the stream against what bounds it: model, memory, disk, and the plan of its cost.

    python scripts/bench_stream.py [CONFIG.yaml] [--only live buffer waiting shards mixing memory]

Every rate stands beside the one that it cannot exceed, measured in turns in the same run. The
results go to docs/benchmarks/, whose README says how to read them.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarking import machine
from benchmarking.results import free_path
from benchmarking.stream_memory import memory
from benchmarking.stream_mixing import mixed
from benchmarking.stream_rates import Row, hand_out, live, row
from benchmarking.stream_shards import read_rate, write_rate
from benchmarking.stream_waiting import waiting

from sae.config import Config
from sae.configuration import from_command_line, from_flat
from sae.files import write_json, write_text
from sae.stream.documents import open_documents
from sae.stream.opening import OpenedModel, open_model, pick_device

CONFIG = machine.ROOT / "configs" / "quickstart.yaml"
HEADER = ("what", "measured", "limit", "unit", "ratio", "goal", "", "how")


class Bench:
    """What the measures share: a configuration, its model once, and how long to measure."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.config, self.is_quick, self.folder = options.config, options.quick, folder
        self.subset: str | None = options.subset
        self.cfg: Config = from_command_line([str(self.config)], "bench_stream")

    @cached_property
    def opened(self) -> OpenedModel:
        return open_model(self.cfg, pick_device(self.cfg.run.device))

    def with_more_text(self) -> OpenedModel:
        """Return the model with the text of `--subset`: a large buffer needs many documents."""
        cfg = from_flat({"data.subset": self.subset}, self.cfg) if self.subset else self.cfg
        return replace(self.opened, cfg=cfg, documents=open_documents(cfg.data))

    @property
    def width(self) -> int:
        return self.opened.reader().widths[0]


def measure_live(bench: Bench) -> Iterator[Row]:
    yield live(bench.opened, bench.cfg, 3 if bench.is_quick else 9)


def measure_buffer(bench: Bench) -> Iterator[Row]:
    capacity = 2**12 if bench.is_quick else 2**17
    yield hand_out(bench.width, capacity, min(4096, capacity // 4), 9 if bench.is_quick else 101)


def measure_waiting(bench: Bench) -> Iterator[Row]:
    for refill in ("thread", "inline"):
        yield waiting(bench.cfg, bench.width, 5 if bench.is_quick else 60, refill)


def measure_shards(bench: Bench) -> Iterator[Row]:
    size = 2**22 if bench.is_quick else 2**28
    options: dict[str, Any] = {"d": bench.width, "shard_bytes": size}
    found = write_rate(bench.folder / "write", **options)
    yield _shard_row("shards: written", found, "shard", "flushed to disk")
    for cold in (False, True):
        found = read_rate(bench.folder / f"read-{cold}", cold=cold, **options)
        place = f"from {found['from']}"
        yield _shard_row(f"shards: read {place}, checked", found, "first", place)
        yield _shard_row(f"shards: read {place}", found, "later", place)


def _shard_row(name: str, found: dict[str, Any], key: str, note: str) -> Row:
    value, limit = (found[f"{k}_gb_per_s"] for k in (key, "plain"))
    return row(name, value, limit, "GB/s", 0.7, f"{note}; limit: the same bytes as plain files")


def measure_mixing(bench: Bench) -> Iterator[Row]:
    opened = bench.with_more_text()
    for capacity in (2**12,) if bench.is_quick else (2**14, 2**17, 2**20):
        yield mixed(opened, bench.cfg, capacity, min(4096, capacity // 4))


def measure_memory(bench: Bench) -> Iterator[Row]:
    steps = 6 * bench.cfg.train.batch_tokens
    yield memory(bench.config, ["--train.tokens", str(steps)])


MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "live": measure_live,
    "buffer": measure_buffer,
    "waiting": measure_waiting,
    "shards": measure_shards,
    "mixing": measure_mixing,
    "memory": measure_memory,
}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; return the path of its JSON."""
    options = _parser().parse_args(arguments)
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python scripts/bench_stream.py", *sys.argv[1:]]),
        "machine": machine.describe(device, options.commit),
        "config": options.config.name,
        "rows": [],
    }
    path = free_path(options.out, f"{document['date']}-{machine.slug(device)}-stream")
    with TemporaryDirectory(dir=options.disk) as folder:
        bench = Bench(options, Path(folder))
        for name in options.only:
            for found in MEASURES[name](bench):
                print(" | ".join(_cells(found)), flush=True)
                document["rows"].append(found)
                document["seconds"] = round(time.monotonic() - started, 1)
                write_json(path, document)
                write_text(path.with_suffix(".md"), as_markdown(document))
    print(f"Written: {path} and {path.with_suffix('.md').name}")
    return path


def as_markdown(document: dict[str, Any]) -> str:
    """Return the document as a page."""
    about = document["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in about["packages"].items() if v)
    lines = [
        f"# The stream on {about['device']}, {document['date']}",
        "",
        f"```\n{document['command']}\n```",
        "",
        f"- commit: {about['commit']}"
        + (", with uncommitted changes" if about["uncommitted_changes"] else ""),
        f"- versions: python {about['python']}, {versions}",
        f"- CPU threads: {about['cpu_threads']}; {document['config']}; "
        f"{document.get('seconds')} seconds",
        "",
    ]
    rows = [HEADER, ["---"] * len(HEADER), *map(_cells, document["rows"])]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"


def _cells(found: Row) -> list[str]:
    limit, ratio = found.get("limit"), found.get("ratio")
    return [
        found["name"],
        f"{found['value']:.4g}",
        "" if limit is None else f"{limit:.4g}",
        found["unit"],
        "" if ratio is None else f"{ratio:.2f}",
        found["goal"],
        "met" if found["is_met"] else "missed",
        found["note"],
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="?", default=CONFIG, help="a run's YAML file")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument(
        "--out", type=Path, default=machine.ROOT / "docs" / "benchmarks", help="where results go"
    )
    parser.add_argument("--disk", type=Path, help="a folder on the disk that is measured")
    parser.add_argument("--subset", help="`data.subset` for mixing, which needs 2²⁰ tokens")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--commit", help="the commit, where the code is not in its repository")
    return parser


if __name__ == "__main__":
    main()
