"""The quickstart's script, as `make quickstart` calls it, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_quickstart_trains_measures_shows_and_says_what_is_next(
    tmp_path: Path, tiny_lm_folder: Path, tiny_text_file: Path
):
    run = tmp_path / "run"
    flags = {
        "run.folder": run,
        "model.name": tiny_lm_folder,
        "model.hookpoint": "model.layers.1",
        "data.source": tiny_text_file,
        "data.subset": "None",
        "data.held_out_fraction": 0.2,
        "stream.buffer_tokens": 2000,
        "coder.d_sae": 64,
        "coder.k": 4,
        "train.tokens": 5120,
        "train.batch_tokens": 256,
    }
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    command = [sys.executable, "scripts/quickstart.py", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert first.returncode == 0, first.stderr
    assert (run / "report.html").stat().st_size > 50_000
    assert json.loads((run / "results.json").read_text())["metrics"]["fvu"] < 1
    for piece in ("loss recovered", f"The run is in {run}", "sae eval", "explore.py", "sae train"):
        assert piece in first.stdout
    again = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert again.returncode == 0, again.stderr
