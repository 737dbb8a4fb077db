"""The command line: sae train | eval | report.

Each verb is a function of the remaining arguments. Mistakes of the user end in one clear message and
exit code 2, without a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

USAGE = """usage: sae VERB …

  sae train CONFIG.yaml [--section.key value …]    train a dictionary
  sae eval RUN_OR_DICTIONARY [--evals a,b]         measure it on held-out text
  sae report RUN                                   write its report.html

`sae VERB --help` says more."""


def train(arguments: Sequence[str]) -> None:
    """Train as CONFIG.yaml and the command line say."""
    from sae.configuration import from_command_line

    cfg = from_command_line(arguments, "sae train")
    from sae.train import run

    run(cfg)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"train": train}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(USAGE)
        return
    verb = VERBS.get(arguments[0])
    if verb is None:
        fail(f"the first word must be one of {', '.join(VERBS)}; got {arguments[0]!r}.")
    try:
        verb(arguments[1:])
    except (ValueError, TypeError, RuntimeError) as error:
        if not is_ours(error):
            raise
        fail(str(error))


def say(text: str) -> None:
    """Print to a person."""
    sys.stdout.write(text + "\n")


def fail(text: str) -> None:
    """Print an error and exit with code 2."""
    sys.stderr.write(f"error: {text}\n")
    raise SystemExit(2)


def is_ours(error: BaseException) -> bool:
    """Say whether this project raised the error: its message then says all a user needs."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "sae" in trace.tb_frame.f_globals.get("__name__", "").split(".")[0]
