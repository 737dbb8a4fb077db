"""One process or two, by every launcher: the same coder, or an error."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from user import ROOT, clean_environment, run_sae

import sae
from sae.config import TrainConfig
from sae.train.distributed import require_divisible
from sae.train.tracking import read_metrics

pytestmark = pytest.mark.slow


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(**environment),
        cwd=ROOT,
        timeout=240,
    )


def torchrun(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    port = f"--master_port={free_port()}"
    return launch("torch.distributed.run", "--nproc_per_node=2", port, *arguments, **environment)


def accelerate(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = ("accelerate.commands.launch", "--main_process_port", free_port())
    return launch(*launcher, *arguments, ACCELERATE_USE_CPU="true")


def test_two_ranks_train_one_coder_on_their_own_data(tiny_config: Path):
    folder = tiny_config.parent / "run"
    done = torchrun("scripts/train.py", tiny_config)
    assert done.returncode == 0, done.stderr
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    assert {p.name for p in newest.glob("source_*.json")} == {"source_0.json", "source_1.json"}
    from safetensors.torch import load_file

    buffers = [load_file(newest / f"source_{rank}.safetensors")["buffer"] for rank in (0, 1)]
    assert not torch.equal(buffers[0], buffers[1])
    rows = read_metrics(folder)
    assert rows[-1]["tokens"] == 24 * 128
    assert rows[-1]["l0"] <= 4
    assert rows[-1]["fvu"] < rows[0]["fvu"]


def test_two_ranks_resume_exactly_and_only_on_two(tiny_config: Path, tmp_path: Path):
    whole = tmp_path / "whole"
    assert torchrun("scripts/train.py", tiny_config, "--run.folder", whole).returncode == 0
    folder = tiny_config.parent / "run"
    assert torchrun("scripts/train.py", tiny_config).returncode == 0
    import shutil

    shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])
    shutil.rmtree(folder / "final")
    flags = ["--train.resume", "auto"]
    alone = run_sae("train", tiny_config, *flags)
    assert alone.returncode == 2
    assert "saved by 2, now 1 run" in alone.stderr
    assert torchrun("scripts/train.py", tiny_config, *flags).returncode == 0
    assert torch.equal(sae.load(whole).W_enc, sae.load(folder).W_enc)


def test_accelerate_launch_on_one_and_two_processes(tiny_config: Path, tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    done = accelerate("--num_processes", 1, "scripts/train.py", tiny_config, "--run.folder", one)
    assert done.returncode == 0, done.stderr
    assert run_sae("train", tiny_config).returncode == 0
    assert torch.equal(sae.load(one).W_enc, sae.load(tiny_config.parent / "run").W_enc)
    arguments = ["--multi_gpu", "--num_processes", 2, "scripts/train.py", tiny_config]
    done = accelerate(*arguments, "--run.folder", two)
    assert done.returncode == 0, done.stderr
    newest = sorted((two / "checkpoints").iterdir())[-1]
    assert len(list(newest.glob("source_*.json"))) == 2


UNSYNCHRONISED = """
from accelerate import Accelerator
import sae.train.distributed as distributed
distributed.require_synchronised(Accelerator())
"""


def test_copies_that_would_not_see_each_other_are_refused(tmp_path: Path):
    script = tmp_path / "bare.py"
    script.write_text(UNSYNCHRONISED)
    if torch.cuda.is_available():
        pytest.skip("a bare Accelerator works where there is a GPU")
    done = torchrun(script)
    assert done.returncode != 0
    assert "2 were launched, but `Accelerator` joins 1" in done.stderr


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"\(2 × 3\); got 64. Use 60"):
        require_divisible(TrainConfig(batch_tokens=64, grad_accumulation_steps=3), 2)
