"""Two processes find what one does, and the first alone writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from eval_stand_ins import FunctionCoder, make_batch

from sae.cli import main
from sae.coder import SparseCoder
from sae.config import CoderConfig, WorldConfig
from sae.evals import read_results
from sae.evals.evaluable import Evaluable
from sae.evals.interface import EvalSetup
from sae.evals.masking import Masking
from sae.evals.ranks import Ranks, packed, unpacked
from sae.worlds import make_world

ROOT = Path(__file__).parent.parent.parent
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WORLD = {
    "world.name": "synth_1k",
    **{"world.n_features": 32, "world.d_in": 16, "world.trees": 0},
}


@pytest.fixture(autouse=True)
def _one_thread():
    """As many threads as the processes that are started have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path},
        cwd=ROOT,
        timeout=280,
    )


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def on_two(launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    if launcher == "torchrun":
        words = ("torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    else:
        port = ("--main_process_port", free_port())
        words = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, *port)
    return launch(*words, ROOT / "scripts" / "eval.py", *arguments)


def dictionary(folder: Path, d_in: int, **metadata: object) -> Path:
    made = SparseCoder.create(d_in, CoderConfig(d_sae=48, k=4), metadata=metadata)
    with torch.no_grad():
        made.W_enc.copy_(made.W_dec)
    made.save(folder)
    return folder


def assert_same_results(one: Path, two: Path) -> None:
    """Equal values, undefined ones, arrays and what was evaluated; times may differ.

    Interventions search along float32 forwards, which the number of threads moves a little.
    """
    first, second = read_results(one), read_results(two)
    assert first.metrics.keys() == second.metrics.keys()
    searched = set(first.evals["interventions"].metrics) if "interventions" in first.evals else ()
    for name, value in first.metrics.items():
        other = second.metrics[name]
        near = {"rel": 1e-3, "abs": 1e-4} if name in searched else {"rel": 1e-9, "abs": 1e-12}
        assert other == (value if value is None else pytest.approx(value, **near)), name
    assert first.undefined == second.undefined
    for name, record in first.evals.items():
        assert second.evals[name].n_tokens == record.n_tokens, name
        assert second.evals[name].n_documents == record.n_documents, name
    assert first.provenance["evaluated"] == second.provenance["evaluated"]
    assert first.provenance["l0"] == second.provenance["l0"]
    for name, array in first.arrays.items():
        other = second.arrays[name]
        near = (1e-3, 1e-4) if name.split("/")[-1] in searched else (1e-9, 1e-11)
        torch.testing.assert_close(
            other, array, rtol=near[0], atol=near[1], equal_nan=True, msg=name
        )
    assert first.explanations == second.explanations


@pytest.mark.slow
def test_text_on_two_processes_by_torchrun(tiny_run_tree, tmp_path):
    folder = dictionary(tmp_path / "run" / "final", 32, hook_name="model.layers.1").parent
    tree = {**tiny_run_tree, "stream": {"sequences_per_forward": 4}}
    tree["eval"] = {"tokens": 600, "downstream_tokens": 300, "judge_latents": 4}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    main(["eval", str(folder), "--out", str(one)])
    done = on_two("torchrun", folder, "--out", two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1
    assert_same_results(one, two)


@pytest.mark.slow
def test_a_world_on_two_processes_by_accelerate(tmp_path):
    folder = dictionary(tmp_path / "d", 16)
    flags = [word for key, value in WORLD.items() for word in (f"--{key}", str(value))]
    evals = "fast,perturbation,absorption_features"
    flags += ["--eval.tokens", "3000", "--evals", evals]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    main(["eval", str(folder), "--out", str(one), *flags])
    done = on_two("accelerate", folder, "--out", two, *flags)
    assert done.returncode == 0, done.stderr
    assert_same_results(one, two)


def test_what_every_process_has_is_not_sent():
    """The dictionary, which here cannot be pickled, stays behind, wherever it hangs."""
    coder = Evaluable(FunctionCoder(lambda x: x), 4)
    setup = EvalSetup(4, 4, n_resamples=2, coder=coder)
    one, other = Masking(setup), Masking(setup)
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    one.all.update(make_batch(x, 0.5 * x))
    received = unpacked(packed(one), other)
    assert received.coder is coder
    assert received.all.reconstruction.setup is setup
    assert received.compute() == one.compute()


class Nested:
    """An accumulator that has its setup in a part alone, as those of probing do."""

    def __init__(self, setup: EvalSetup) -> None:
        self.part = Masking(setup)


def test_what_is_not_sent_is_found_wherever_it_hangs():
    coder = Evaluable(FunctionCoder(lambda x: x), 4)
    setup = EvalSetup(4, 4, n_resamples=2, coder=coder)
    received = unpacked(packed(Nested(setup)), Nested(setup))  # pyright: ignore
    assert received.part.setup is setup  # pyright: ignore


def test_every_batch_is_taken_by_one_process():
    for size in (1, 2, 3):
        takers = [[r for r in range(size) if Ranks(r, size).takes(n)] for n in range(7)]
        assert all(len(found) == 1 for found in takers)


def test_one_process_is_first_and_alone():
    here = Ranks.here()
    assert (here.rank, here.size, here.is_first) == (0, 1, True)
    assert here.everywhere("mine") == ["mine"]


def test_the_world_of_these_tests_is_small():
    fields = {key.removeprefix("world."): value for key, value in WORLD.items()}
    assert make_world(WorldConfig(**fields)).d_in == 16
