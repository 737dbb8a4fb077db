"""The command line: sae train | plan | eval | compare | report | harvest.

Each verb is a function of the remaining arguments. A mistake of the user ends in one clear message
and exit code 2, without a traceback.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

    from sae.config import Config
    from sae.evals.results import EvalResults
    from sae.train.plan import Plan

USAGE = """usage: sae VERB …

  sae train CONFIG.yaml [--section.key value …]    train a dictionary
  sae plan CONFIG.yaml [--section.key value …]     say what training will cost
  sae eval RUN_OR_DICTIONARY [--evals fast|a,b]    measure it on held-out text, --nulls beside it
  sae compare A B …                                put evaluated dictionaries side by side
  sae report RUN                                   write its report.html
  sae harvest CONFIG.yaml [--section.key value …]  write activations to disk, to train from them

`sae VERB --help` says more."""

EVAL_USAGE = """usage: sae eval RUN_OR_DICTIONARY [--evals fast|full|a,b] [--nulls a,b,runs/c]
                [--out FILE] [--again true] [--section.key value …]

Measure a dictionary on documents that its training never saw, write results.json (beside the run,
or to --out) and print a table. The run's own configuration says model and text; for a dictionary
without a run, name what its metadata do not: --data.source, --model.name, --model.hookpoint. One
that was trained on a world is measured on fresh samples of it, against its known features.

--evals takes names, and sets of those that apply: fast, full (all: minutes), probing,
absorption.

--nulls puts dictionaries that are none beside it, on the same tokens: shuffled, permuted, random,
pca, identity, on a world oracle (the truth), and folders of runs that were trained as nulls.

An evaluation that was cut off goes on: evals in the file that finished with the same dictionary,
tokens, seed and settings are kept, unless --again; with nulls it goes on only where they finished
too. Several processes (torchrun -m sae eval …, or accelerate launch scripts/eval.py …) share the
documents; nulls take one process."""

COMPARE_USAGE = """usage: sae compare A B … [--out FOLDER] [--unpaired true]

Compare evaluated dictionaries: run folders, dictionary folders or results files that `sae eval`
wrote. Prints a table and writes compare.json and compare.html to FOLDER (here: comparison/). The
others are compared with A; intervals of differences are over the documents that all were evaluated
on. Results of different tokens, documents, seeds or models are refused, unless --unpaired."""

REPORT_USAGE = """usage: sae report RUN [--section.key value …]

Write report.html into the run folder: one file that opens from disk, with training curves, the
evaluations in results.json, and every latent with its contexts and logit effects."""


def train(arguments: Sequence[str]) -> None:
    """Train as CONFIG.yaml and the command line say."""
    from sae.configuration import from_command_line

    cfg = from_command_line(arguments, "sae train")
    from sae.train import run
    from sae.train.distributed import leave_group
    from sae.train.interrupt import Interrupted

    try:
        folder = run(cfg)
    except Interrupted as stopped:
        told = "there was nothing to save yet"
        if stopped.is_saved:
            told = "the state is saved. Continue with the same command and --train.resume auto"
        if is_main_process():
            sys.stderr.write(f"Stopped; {told}.\n")
        raise
    if is_main_process():
        is_fleet = not cfg.fleet.is_empty
        say(
            f"The dictionaries are below {folder}; {folder / 'summary.html'} compares them."
            if is_fleet
            else f"The dictionary is in {folder / 'final'}."
        )
    leave_group()


def plan(arguments: Sequence[str]) -> None:
    """Say what training as CONFIG.yaml says will cost, from its first seconds."""
    from sae.configuration import from_command_line

    cfg = from_command_line(arguments, "sae plan")
    from sae.train.plan import plan as planned

    found = planned(cfg)
    print_plan(found)
    if problems := found.problems():
        raise ValueError("the run does not fit. " + " ".join(problems))


def evaluate(arguments: Sequence[str]) -> None:
    """Measure a dictionary, write results.json, print the table."""
    place, flags = place_and_flags(arguments, EVAL_USAGE)
    flags_of_its_own = ("--evals", "--nulls", "--out", "--again")
    names, nulls, out, again = (taken(flags, name) for name in flags_of_its_own)
    from sae.evals.held_out import evaluate_held_out
    from sae.evals.null_rows import checked_nulls
    from sae.evals.ranks import join_ranks
    from sae.evals.registry import checked_names
    from sae.evals.results import write_results
    from sae.evals.resuming import NOTHING, finished_before
    from sae.interop import load
    from sae.train.distributed import leave_group, require_joinable

    if names:
        flags += ["--eval.evals", *checked_names(names.split(","))]
    if nulls:
        flags += ["--eval.nulls", *checked_nulls(nulls.split(","))]
    require_joinable()
    ranks = join_ranks()
    told = say if ranks.is_first else lambda _: None
    coder = load(place)
    target = results_file(place, out)
    cfg = configuration_of(place, {**coder.metadata, "site": coder.cfg.site}, flags)
    is_again = is_yes(again, "--again")
    before = NOTHING if is_again else finished_before(target, coder, cfg, told)
    with progress_bar(is_shown=ranks.is_first) as tell:
        results = evaluate_held_out(
            coder, cfg, tell, before=before, keep=lambda found: write_results(found, target)
        )
    leave_group()
    if ranks.is_first:
        if results is not before:
            write_results(results, target)
        print_results(results, cfg)
        say(f"Written to {target}.")


def compare(arguments: Sequence[str]) -> None:
    """Put evaluated dictionaries side by side."""
    place, words = place_and_flags(arguments, COMPARE_USAGE)
    out, unpaired = taken(words, "--out"), taken(words, "--unpaired")
    if unknown := [word for word in words if word.startswith("-")]:
        raise ValueError(
            f"`sae compare` takes --out and --unpaired; got {unknown[0]}. See `sae compare --help`."
        )
    from sae.analysis.comparison import compare as compared
    from sae.analysis.comparison import write_comparison
    from sae.analysis.comparison.printed import print_comparison

    found = compared([place, *map(Path, words)], unpaired=is_yes(unpaired, "--unpaired"))
    print_comparison(found)
    page = write_comparison(found, Path(out or "comparison"))
    say(f"Open {page} in a browser; the numbers are in {page.with_suffix('.json')}.")


def report(arguments: Sequence[str]) -> None:
    """Write report.html into a run folder."""
    place, flags = place_and_flags(arguments, REPORT_USAGE)
    from sae.configuration import read_run_config, with_flags

    cfg = with_flags(read_run_config(place), flags, "sae report RUN")
    from sae.analysis.run_report import report_run

    path = report_run(place, cfg, say)
    say(f"Open {path} ({path.stat().st_size / 1e6:.1f} MB) in a browser.")


def harvest(arguments: Sequence[str]) -> None:
    """Write the activations that CONFIG.yaml and the command line name to disk, once."""
    from sae.configuration import from_command_line

    cfg = from_command_line(arguments, "sae harvest")
    from sae.stream.harvest import harvest as write_shards

    with progress_bar() as tell:
        folder = write_shards(cfg, say=say, tell=tell)
    say(f"Train on them with `--stream.shards {folder}`.")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "plan": plan,
    "eval": evaluate,
    "compare": compare,
    "report": report,
    "harvest": harvest,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(USAGE)
        return
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sae").setLevel(logging.INFO)
    verb = VERBS.get(arguments[0])
    try:
        if verb is None:
            raise ValueError(
                f"the first word must be one of {', '.join(VERBS)}; got {arguments[0]!r}."
            )
        verb(arguments[1:])
    except (ValueError, TypeError, RuntimeError) as error:
        if not is_ours(error) or "SAE_TRACEBACK" in os.environ:
            raise
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        raise SystemExit(141) from None


def _nobody_reads() -> bool:
    """Say whether stdout's reader is gone, as in `sae … | head`; what is left then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
    return True


def place_and_flags(arguments: Sequence[str], usage: str) -> tuple[Path, list[str]]:
    """Return a verb's path and the words after it; print its usage where asked."""
    if not arguments or arguments[0] in ("-h", "--help"):
        say(usage)
        raise SystemExit(0)
    return Path(arguments[0]), list(arguments[1:])


def taken(flags: list[str], name: str) -> str | None:
    """Take `name VALUE` out of `flags` and return the value; None where it is not there."""
    if name not in flags:
        return None
    place = flags.index(name)
    if place + 1 == len(flags):
        raise ValueError(f"`{name}` must be followed by a value; got nothing.")
    _, value = flags[place : place + 2]
    del flags[place : place + 2]
    return value


def is_yes(value: str | None, name: str) -> bool:
    """Return a flag's truth; False where it was not given."""
    words = {None: False, "true": True, "false": False}
    if value not in words:
        raise ValueError(f"`{name}` must be true or false; got {value!r}. Give one of them.")
    return words[value]


def results_file(place: Path, out: str | None) -> Path:
    """Return where results go: as told, else beside what was evaluated, else here."""
    if out is not None:
        return Path(out)
    folder = place if place.is_dir() else place.parent if place.is_file() else Path()
    return folder / "results.json"


def configuration_of(place: Path, metadata: dict, flags: list[str]) -> Config:
    """Return what a run's folder says, or a dictionary's metadata, and then the flags."""
    from sae.configuration import CONFIG_FILE, from_flat, read_run_config, with_flags

    if (place / CONFIG_FILE).exists():
        base = read_run_config(place)
    else:
        known = {
            "model_name": "model.name",
            "hook_name": "model.hookpoint",
            "hook_name_out": "model.target",
            "model_other": "model.other",
            "model_reinitialised": "model.reinitialised",
            "site": "coder.site",
            "context_size": "data.context_size",
        }
        given = {key: metadata.get(name) for name, key in known.items()}
        told = {key: value for key, value in given.items() if value not in (None, "")}
        told |= {f"world.{name}": value for name, value in metadata.get("world", {}).items()}
        base = from_flat(told)
    return with_flags(base, flags, "sae eval RUN_OR_DICTIONARY")


@contextmanager
def progress_bar(is_shown: bool = True) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a bar for each stage that is told as (name, done, wanted)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True, quiet=not is_shown), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, wanted: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=wanted)
            bar.update(tasks[stage], completed=done)

        yield tell


def print_plan(found: Plan) -> None:
    """Print what a run will cost."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from sae.train.plan import gigabytes

    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    if found.members:
        table.add_row(f"[bold]{len(found.members)} coders on one stream[/bold]")
        for name in found.members:
            table.add_row(name)
        table.add_section()
    processes = "" if found.n_processes == 1 else f" a process, of {found.n_processes}"
    table.add_row(f"[bold]memory on {found.device}{processes}[/bold]")
    for part, size in found.memory.items():
        table.add_row(part, gigabytes(size))
    table.add_row("peak", f"{gigabytes(found.peak)} of {gigabytes(found.memory_available)}")
    table.add_section()
    table.add_row("[bold]disk[/bold]")
    for part, size in found.disk.items():
        table.add_row(part, gigabytes(size))
    table.add_row("free", gigabytes(found.disk_free))
    table.add_section()
    speed = found.speed
    table.add_row("[bold]time, from a few seconds of it[/bold]")
    table.add_row("activations", f"{speed.rows_per_second:,.0f} a second and process")
    table.add_row("a step" + " of all" * bool(found.members), f"{speed.step_seconds * 1e3:,.1f} ms")
    table.add_row("tokens", f"{found.tokens:,} in {found.steps:,} steps")
    table.add_row("in all", duration(found.seconds))
    Console().print(table)


def duration(seconds: float) -> str:
    """Return seconds as a person reads them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_results(results: EvalResults, cfg: Config) -> None:
    """Print the table of an evaluation."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from sae.evals.results import table_rows

    origin = results.provenance
    seen = f"{origin['n_tokens']:,} held-out tokens of {origin['n_documents']:,} documents"
    if cfg.world.name:
        where, seen = f"world {cfg.world.name}", f"{origin['n_tokens']:,} held-out samples"
    else:
        where = f"{origin['hookpoint']} of {cfg.model.name}"
    title = f"{where}: {seen}, L0 {origin['l0']:.1f}"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("metric", no_wrap=not results.nulls, min_width=28)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95% interval", min_width=17 if results.nulls else None)
    if results.nulls:
        table.add_column("of the way", justify="right", no_wrap=True)
    for name in results.nulls:
        table.add_column(name, justify="right", no_wrap=True, style="dim")
    before = ""
    for row in table_rows(results):
        if row.group != before:
            table.add_section()
            seconds = seconds_of(results, row.group)
            table.add_row(f"[bold]{row.group}[/bold] [dim]{seconds}[/dim]")
        share = (row.share,) if results.nulls else ()
        table.add_row(row.label, row.value, row.interval, *share, *row.nulls)
        before = row.group
    shared = {name: f"{spent:.1f} s" for name, spent in origin["seconds"].items()}
    table.caption = "shared by all: " + ", ".join(
        f"{name} {spent}" for name, spent in shared.items()
    )
    table.caption_justify = "left"
    # With many nulls a table is wider than some terminals: its lines are then folded, not cut.
    # What is measured leaves out the least widths of columns that wrap.
    least = Console(width=1000).measure(table).minimum + 45 if results.nulls else 0
    Console(width=max(Console().width, least)).print(table)
    for line in about_nulls(results):
        say(line)


def about_nulls(results: EvalResults) -> list[str]:
    """Return what stands below a table with nulls: what they are, and which evals they lack."""
    if not results.nulls:
        return []
    end = "the oracle's, or the best" if "oracle" in results.nulls else "the best"
    lines = [f"of the way: from the score of shuffled codes (0) to {end} (1)."]
    spent = {name: null.seconds for name, null in results.nulls.items()}
    took = [f"{name} {seconds:.1f} s" for name, seconds in spent.items() if seconds is not None]
    lines += [f"nulls took {', '.join(took)}."] if took else []
    left_out = {name: why for null in results.nulls.values() for name, why in null.left_out.items()}
    return lines + [f"{name} is not run on nulls: {why}." for name, why in left_out.items()]


def seconds_of(results: EvalResults, name: str) -> str:
    """Return the time that an eval took beside the passes that it shares with others."""
    records = {str(key): record for key, record in results.evals.items()}
    return f"took {records[name].seconds:.1f} s" if name in records else ""


def say(text: str) -> None:
    """Print to a person."""
    sys.stdout.write(text + "\n")


def is_main_process() -> bool:
    """Say whether this is the only process, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def is_ours(error: BaseException) -> bool:
    """Say whether a `raise` of this project made the error: its message then says all.

    An error that its code ran into is a fault of the project and keeps its traceback.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    root = Path(__file__).parent
    homes = (root, root.parent / "sae_kernels", root.parent / "kernels")
    is_inside = any(Path(frame.filename).is_relative_to(home) for home in homes)
    return is_inside and (frame.line or "").startswith("raise")
