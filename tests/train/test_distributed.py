"""One process or two, by every launcher: the same coder, or an error."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from user import ROOT, clean_environment, run_here

import sae
from sae.config import TrainConfig
from sae.train.distributed import require_divisible
from sae.train.metrics import MetricSums
from sae.train.tracking import read_metrics

pytestmark = pytest.mark.slow
TIMES = ("tokens_per_second", "wait_share")
LOSSES = ("loss", "reconstruction", "auxk")


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


def test_two_ranks_resume_exactly(tiny_config: Path, tmp_path: Path):
    # Checkpoints fall between refreshes of the dead list and between rows of the log.
    odd = ["--train.checkpoint_every_steps", "7", "--train.log_every_steps", "5"]
    odd += ["--train.dead_after_tokens", "256", "--train.dead_refresh_steps", "4"]
    whole = tmp_path / "whole"
    assert torchrun("scripts/train.py", tiny_config, *odd, "--run.folder", whole).returncode == 0
    folder = killed_copy(whole, tiny_config.parent / "run")
    flags = [*odd, "--train.resume", "auto"]
    assert torchrun("scripts/train.py", tiny_config, *flags).returncode == 0
    assert torch.equal(sae.load(whole).W_enc, sae.load(folder).W_enc)
    assert_same_state(whole, folder)


def test_two_ranks_resample_alike_and_train_one_coder_by_muon(tiny_config: Path):
    """Each process keeps its own weights: the last save of one is what the other would save."""
    flags = ["--train.optimizer", "muon", "--train.step", "autograd", "--train.ema_decay", "0.5"]
    flags += ["--train.resample_every_tokens", "768", "--train.resample_until_fraction", "1"]
    flags += ["--train.dead_after_tokens", "256", "--coder.d_sae", "256", "--coder.k", "1"]
    script = ROOT / "tests" / "train" / "ranks_agree.py"
    done = torchrun(script, tiny_config, *flags)
    assert done.returncode == 0, done.stderr
    assert "resampled" in done.stdout


def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(
    tiny_config: Path, tmp_path: Path
):
    """The batches are the same, so the coders are, up to the order in which gradients add up."""
    flags = ["--train.checkpoint_every_steps", "7", "--train.log_every_steps", "5"]
    flags += ["--coder.k_aux", "0", "--stream.lanes", "2"]
    whole, folder = tmp_path / "whole", tiny_config.parent / "run"
    assert torchrun("scripts/train.py", tiny_config, *flags, "--run.folder", whole).returncode == 0
    alone = tmp_path / "alone"
    assert on_one("scripts/train.py", tiny_config, *flags, "--run.folder", alone).returncode == 0
    for begun, then in ((whole, on_one), (alone, torchrun)):
        shutil.rmtree(folder, ignore_errors=True)
        killed_copy(begun, folder)
        # Two processes need not be told the lanes of the run.
        again = flags[:-2] if then is torchrun else flags
        done = then("scripts/train.py", tiny_config, *again, "--train.resume", "auto")
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(sae.load(folder).W_enc, sae.load(whole).W_enc, rtol=0, atol=1e-5)
        rows = zip(read_metrics(folder), read_metrics(whole), strict=True)
        for one, other in rows:
            assert one["fvu"] == pytest.approx(other["fvu"], rel=1e-4)
            assert one["dead_share"] == other["dead_share"]


def killed_copy(run: Path, folder: Path) -> Path:
    """Copy a finished run to `folder`, as if killed there before its last checkpoint."""
    shutil.copytree(run, folder)
    shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])
    shutil.rmtree(folder / "final")
    return folder


def on_one(_script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_here("train", *arguments)


def test_processes_that_cannot_share_the_lanes_are_refused(tiny_config: Path):
    done = torchrun("scripts/train.py", tiny_config, "--stream.lanes", "3")
    assert done.returncode != 0
    assert "got 3 lanes and 2 processes. Launch 1, 3 of them" in done.stderr


def assert_same_state(first: Path, second: Path) -> None:
    """Compare all that two runs' last checkpoints hold, each rank's own counts too, and the log."""
    newest = [sorted((run / "checkpoints").iterdir())[-1] for run in (first, second)]
    for name in ("trainer", "rank_0", "rank_1"):
        one, other = (load_file(path / f"{name}.safetensors") for path in newest)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    rows = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run)]
        for run in (first, second)
    ]
    assert rows[0] == rows[1]


def test_accelerate_launch_on_one_and_two_processes(tiny_config: Path, tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    done = accelerate("--num_processes", 1, "scripts/train.py", tiny_config, "--run.folder", one)
    assert done.returncode == 0, done.stderr
    assert run_here("train", tiny_config).returncode == 0
    assert torch.equal(sae.load(one).W_enc, sae.load(tiny_config.parent / "run").W_enc)
    arguments = ["--multi_gpu", "--num_processes", 2, "scripts/train.py", tiny_config]
    done = accelerate(*arguments, "--run.folder", two)
    assert done.returncode == 0, done.stderr
    newest = sorted((two / "checkpoints").iterdir())[-1]
    assert {p.name for p in newest.glob("rank_*.json")} == {"rank_0.json", "rank_1.json"}
    buffers = [
        load_file(newest / f"rank_{rank}.safetensors")[f"source.lane_{rank}.buffer.0"]
        for rank in (0, 1)
    ]
    assert not torch.equal(buffers[0], buffers[1]), "each reads data of its own"
    rows = read_metrics(two)
    assert rows[-1]["tokens"] == 24 * 128
    assert rows[-1]["l0"] <= 4
    assert rows[-1]["fvu"] < rows[0]["fvu"]


HALVES = """
import sys
import torch
from accelerate import Accelerator
from step_states import inputs_of, make

torch.set_num_threads(1)
folder = sys.argv[1]
accelerator = Accelerator(cpu=True)
rank, world_size = accelerator.process_index, accelerator.num_processes
x = torch.load(folder + "/x.pt")


def train(step_name, clip, k_aux):
    settings = {"coder.d_sae": 128, "coder.k_aux": k_aux, "train.dead_after_tokens": 512}
    if clip:
        settings["train.grad_clip_norm"] = clip
    state, step = make(x, step_name, **settings)
    for i in range(20):
        if i % 5 == 0:
            state.dead.refresh(state.tokens_seen)
        batch = inputs_of(state, 1, 256)[0]
        step([batch.chunk(world_size)[rank]], 1e-3)
        state.step = i + 1
    state.dead.refresh(state.tokens_seen)
    tensors = {name: t.detach() for name, t in state.tensors().items()}
    name = f"{step_name}_{world_size}_{rank}_{k_aux}.pt"
    torch.save(tensors | state.metrics.sums, f"{folder}/{name}")


for clip, k_aux in ((0.0, 8), (0.05, 0)):
    for step_name in ("fused", "autograd"):
        train(step_name, clip, k_aux)
"""


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, activations: torch.Tensor) -> Path:
    """A folder of what two processes trained on their halves of each batch, and one on all."""
    folder = tmp_path_factory.mktemp("halves")
    script = folder / "halves.py"
    script.write_text(HALVES)
    torch.save(activations, folder / "x.pt")
    path = f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests' / 'train'}"
    for launcher in (torchrun, alone):
        done = launcher(script, folder, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("k_aux", [8, 0])
def test_two_halves_of_a_batch_are_the_batch(halves: Path, k_aux: int):
    """The fused step on two ranks is that on one, and autograd's; both ranks hold the same bits.

    (AuxK's share is of each rank's own residual, so with it one rank is a little different.
    Without it the gradient is clipped.)
    """
    names = ("fused_2_0", "fused_2_1", "autograd_2_0", "fused_1_0")
    ranks = {name: torch.load(halves / f"{name}_{k_aux}.pt") for name in names}
    assert bool(len(ranks["fused_2_0"]["dead.indices"])) == bool(k_aux)
    for name, value in ranks["fused_2_0"].items():
        other = ranks["fused_2_1"][name]
        assert torch.equal(value, other) or name in MetricSums(torch.zeros(1), LOSSES).sums, name
        for compared in ("autograd_2_0",) if k_aux else ("autograd_2_0", "fused_1_0"):
            if name.startswith("coder"):
                expected = ranks[compared][name]
                torch.testing.assert_close(value, expected, rtol=0, atol=2e-4, msg=compared + name)
    n = ranks["fused_2_0"]["n"] + ranks["fused_2_1"]["n"]
    assert n == ranks["fused_1_0"]["n"] == 20 * 256


def alone(script: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = (sys.executable, script, *arguments)
    return subprocess.run(
        list(map(str, arguments)),
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(**environment),
        timeout=240,
    )


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


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_of_a_cluster_launcher_that_do_not_join_are_refused(tiny_config: Path, variable: str):
    done = run_here("train", tiny_config, **{variable: "4"})
    assert done.returncode == 2
    assert "4 were launched" in done.stderr


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"\(2 × 3\); got 64. Use 60"):
        require_divisible(TrainConfig(batch_tokens=64, grad_accumulation_steps=3), 2)
