"""A run that is killed goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from user import ROOT, clean_environment, command, run_here

import sae
from sae.configuration import from_command_line
from sae.train import run
from sae.train.interrupt import Interrupted
from sae.train.tracking import read_metrics


def configured(path: Path, *flags: str) -> sae.Config:
    return from_command_line([str(path), *flags], "sae train")


def states(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    return {
        **load_file(newest / "trainer.safetensors"),
        **load_file(newest / "rank_0.safetensors"),
    }


def assert_same_run(first: Path, second: Path) -> None:
    one, other = states(first), states(second)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    times = ("tokens_per_second", "wait_share")
    rows = [
        [{k: v for k, v in row.items() if k not in times} for row in read_metrics(folder)]
        for folder in (first, second)
    ]
    assert rows[0] == rows[1]
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(sae.load(first), name), getattr(sae.load(second), name))


@pytest.mark.parametrize("stop_at", [1, 5, 12, 18, 23])
@pytest.mark.parametrize(
    "flags",
    [
        ["--stream.reuse", "1"],
        ["--stream.reuse", "3", "--train.step", "autograd"],
        ["--stream.reuse", "3", "--train.adam_moments", "8bit"],
        ["--stream.lanes", "2"],
    ],
    ids=["fused", "autograd", "8 bits", "two lanes"],
)
def test_stop_and_resume_is_the_uninterrupted_run(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
    flags: list[str],
):
    """Stopped by a signal at any step: mid-cycle, at a checkpoint, between log rows."""
    import sae.train.trainer as trainer

    whole = run(configured(tiny_config, *flags, "--run.folder", str(tmp_path / "whole")))
    honest, sent = trainer.lr_at, []

    def interrupting(step: int, cfg):
        if step == stop_at and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(step, cfg)

    monkeypatch.setattr(trainer, "lr_at", interrupting)
    with pytest.raises(Interrupted) as stopped:
        run(configured(tiny_config, *flags))
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(trainer, "lr_at", honest)
    resumed = run(configured(tiny_config, *flags, "--train.resume", "auto"))
    assert_same_run(whole, resumed)


@pytest.mark.slow
def test_kill_9_and_resume_is_the_uninterrupted_run(tiny_config: Path, tmp_path: Path):
    flags = ["--train.tokens", str(120 * 128), "--train.log_every_steps", "20"]
    whole = tmp_path / "whole"
    assert run_here("train", tiny_config, *flags, "--run.folder", whole).returncode == 0
    folder = tiny_config.parent / "run"
    process = subprocess.Popen(
        command("train", tiny_config, *flags),
        env=clean_environment(),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "final").exists()
    done = run_here("train", tiny_config, *flags, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(tiny_config: Path, number: signal.Signals):
    folder = tiny_config.parent / "run"
    endless = ["--train.tokens", "100000000", "--train.checkpoint_every_steps", "1000000"]
    process = subprocess.Popen(
        command("train", tiny_config, *endless),
        env=clean_environment(),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert "--train.resume auto" in errors
    assert len(list(folder.glob("checkpoints/step_*"))) == 1


def test_resuming_a_finished_run_changes_nothing(tiny_config: Path):
    folder = run(configured(tiny_config))
    before = states(folder)
    again = run(configured(tiny_config, "--train.resume", "auto"))
    after = states(again)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resume_auto_starts_anew_where_there_is_nothing(tiny_config: Path):
    folder = run(configured(tiny_config, "--train.resume", "auto"))
    assert (folder / "final").exists()


def test_a_half_written_checkpoint_is_not_taken(tiny_config: Path):
    folder = run(configured(tiny_config))
    (folder / "checkpoints/.step_00000099.partial").mkdir()
    again = run(configured(tiny_config, "--train.resume", "auto"))
    assert sorted(p.name for p in (again / "checkpoints").glob("step_*"))[-1] == "step_00000024"


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "manifest"])
@pytest.mark.parametrize("name", ["trainer.safetensors", "rank_0.safetensors", "cfg.json"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_serves(
    tiny_config: Path, harm: str, name: str
):
    folder = run(configured(tiny_config))
    older, newest = sorted((folder / "checkpoints").glob("step_*"))
    file = newest / ("manifest.json" if harm == "manifest" else name)
    data = bytearray(file.read_bytes())
    if harm == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=rf"{newest.name}.*Remove the folder.*{older.name}"):
        run(configured(tiny_config, "--train.resume", "auto"))
    import shutil

    shutil.rmtree(newest)
    run(configured(tiny_config, "--train.resume", "auto"))
    assert newest.exists()


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from sae.train import checkpoint
honest = checkpoint.save_checkpoint
def limited(state, *args, **kwargs):
    if state.step > 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return honest(state, *args, **kwargs)
import sae.train.trainer
sae.train.trainer.save_checkpoint = limited
from sae.cli import main
main(["train", sys.argv[1]])
"""


@pytest.mark.slow
def test_a_full_disk_ends_with_a_clear_error_and_the_last_checkpoint(tiny_config: Path):
    """The kernel refuses to let files grow, as it does on a full disk, from the second save on."""
    import sys

    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tiny_config)],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(),
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "the disk is full" in done.stderr
    folder = tiny_config.parent / "run/checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_00000006"]
    assert torch.isfinite(sae.load(folder / "step_00000006").W_enc).all()
    done = run_here("train", tiny_config, "--train.resume", "auto")
    assert done.returncode == 0, done.stderr
