"""The peak memory of a run beside what `sae plan` says before it."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarking.machine import ROOT
from benchmarking.stream_rates import Row

CODE = """
import json, sys
import torch
from sae.configuration import from_command_line
from sae.train.memory import peak
torch.set_num_threads(int(sys.argv.pop(1)))
what, arguments = sys.argv[1], sys.argv[2:]
cfg = from_command_line(arguments, "sae train")
if what == "plan":
    from sae.train.plan import plan
    found = plan(cfg)
    print(json.dumps({"bytes": found.peak, "parts": found.memory}))
else:
    from sae.train import run
    run(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({"bytes": peak(device)}))
"""


def memory(config: Path, flags: list[str]) -> Row:
    """Plan and then train in processes of their own, and compare."""
    with TemporaryDirectory() as folder:
        arguments = [str(config), *flags, "--run.folder", f"{folder}/run"]
        planned, taken = (_bytes(what, arguments) for what in ("plan", "train"))
    ratio = planned / taken
    return {
        "name": "memory: planned",
        "value": planned / 1e9,
        "limit": taken / 1e9,
        "unit": "GB",
        "ratio": ratio,
        "goal": "within 10%",
        "is_met": abs(ratio - 1) <= 0.1,
        "note": f"limit: the peak of the run; {config.name} {' '.join(flags)}",
    }


def _bytes(what: str, arguments: list[str]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(torch.get_num_threads()), what, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if done.returncode != 0:
        raise RuntimeError(f"`{what}` must work to be measured; it said: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["bytes"]
