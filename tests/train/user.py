"""Running the command line as a user does, for tests."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from sae.cli import main

ROOT = Path(__file__).parent.parent.parent


def clean_environment(**more: str) -> dict[str, str]:
    """Return the environment of a user's shell, without what a launcher may have left."""
    launcher = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in launcher}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def command(*arguments: object) -> list[str]:
    """Return the command line of `sae …` in this environment."""
    return [sys.executable, "-m", "sae", *map(str, arguments)]


def run_sae(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `sae …` as a user does."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(**more),
        cwd=ROOT,
    )


def run_here(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `sae …` in this process, which spares a start."""
    words = list(map(str, arguments))
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        patch.dict(os.environ, clean_environment(**more), clear=True),
    ):
        try:
            main(words)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())
