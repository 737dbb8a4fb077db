"""The benchmark of training steps: what it writes, when it gives no time, its floors and goals."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.train import steps

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_step  # noqa: E402 - a script is not installed
from benchmarking import ceilings, machine, peers, step_peers, step_shapes  # noqa: E402
from benchmarking.clocks import CpuClock, CudaClock  # noqa: E402
from benchmarking.floors import Ceilings, floor_ms  # noqa: E402
from benchmarking.shapes import GPU_SHAPES, Shape  # noqa: E402
from benchmarking.step_checking import Reference  # noqa: E402
from benchmarking.step_clocks import (  # noqa: E402
    CpuStepClock,
    CudaStepClock,
    peak_of_allocations,
)
from benchmarking.step_contenders import (  # noqa: E402
    CPU_GOALS,
    FUSED,
    H200_GOALS,
    UNIT,
    UNTRAINED,
    contenders,
)
from benchmarking.step_floors import step_work  # noqa: E402
from benchmarking.step_results import steps_page  # noqa: E402
from benchmarking.step_running import relate  # noqa: E402
from benchmarking.step_task import Trainee, draw_task  # noqa: E402

TINY = Shape("tiny", 48, 16, 96, 4)
OWN_PACKAGES = {"eai-sparsify", "sae-lens", "dictionary_learning"}
H200 = Ceilings(4.3e12, 6e12, 790e12, 50_000_000)  # the byte model's device


@pytest.fixture(autouse=True)
def _tiny_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure a tiny shape on the CPU, with ceilings that take no time."""
    monkeypatch.setattr(bench_step, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setitem(step_shapes.CPU_STEP_SHAPES, "tiny", TINY)
    monkeypatch.setattr(ceilings, "CPU_COPY_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 32)
    monkeypatch.setattr(bench_step, "make_clock", lambda *_: CpuClock(seconds=0.001, most=3))
    monkeypatch.setattr(ceilings, "CpuClock", lambda **_: CpuClock(seconds=0.001, most=3))
    monkeypatch.setattr(
        bench_step, "make_step_clock", lambda *_: CpuStepClock(seconds=0.001, least=2, most=3)
    )


def run_tiny(out: Path, *flags: str) -> dict[str, Any]:
    path = bench_step.main(["--shapes", "tiny", "--out", str(out), *flags])
    return json.loads(path.read_text())


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in document["rows"]}


def test_a_run_checks_and_times_every_row_and_writes_both_files(tmp_path: Path):
    document = run_tiny(tmp_path)
    rows = by_name(document)
    assert document["complete"]
    assert list(rows) == [row.name for row in contenders("cpu")]
    for name, row in rows.items():
        if name in OWN_PACKAGES and row["status"] == "absent":
            continue
        assert row["status"] == "ok", row
        low, high = row["ms_quartiles"]
        assert 0 < low <= row["ms"] <= high
        assert row["over_unit"] == pytest.approx(row["ms"] / rows[UNIT]["ms"])
        assert row["over_fused"] == pytest.approx(row["ms"] / rows[FUSED]["ms"])
        if name not in UNTRAINED:
            assert row["extra_memory_bytes"] > 0
    for name in (FUSED, f"{FUSED}, AuxK", "dense autograd, fp32", "torch-ops sketch"):
        assert rows[name]["loss_deviation"] < 1e-4, name
        losses = rows[name]["losses"]
        assert losses[3] < 0.99 * losses[0], "the check must see training"  # the same tokens
    assert rows[f"{FUSED}, AuxK"]["n_dead"] == 24
    assert rows[FUSED]["floor_share"] == pytest.approx(rows[FUSED]["floor_ms"] / rows[FUSED]["ms"])
    assert "floor_ms" not in rows[f"{FUSED}, bf16"]  # the ceilings are float32's
    assert set(document["loads"]) == {"tiny"}
    name = f"{document['date']}-cpu-step"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json", f"{name}.md"}
    page = (tmp_path / f"{name}.md").read_text()
    assert page.count("\n| ") == len(rows) + 2
    assert document["command"] in page
    assert "24 latents called dead" in page
    assert "Load averages before" in page


def test_a_peer_that_is_missing_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("sparsify", "sae_lens", "dictionary_learning"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    rows = by_name(run_tiny(tmp_path, "--only", FUSED, *OWN_PACKAGES, "--firing", "log-normal"))
    for name in OWN_PACKAGES:
        assert rows[name]["status"] == "absent"
        assert "ms" not in rows[name]
        assert "is not installed" in rows[name]["reason"]
    assert rows[FUSED]["status"] == "ok"


def test_a_package_is_imported_without_what_its_init_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "strange_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('needs the world')")
    (package / "part.py").write_text("answer = 42")
    (package / "broken.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    step_peers._without_init("strange_package", "strange-package")
    part = step_peers._submodule("strange_package", "strange-package", "part")
    assert part.answer == 42
    with pytest.raises(peers.Absent, match="strange-package cannot be imported"):
        step_peers._submodule("strange_package", "strange-package", "broken")
    for name in [name for name in sys.modules if name.startswith("strange_package")]:
        del sys.modules[name]


def test_a_wrong_step_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Twice the learning rate shows in the losses only from the second step on."""
    right = steps.make_step

    def wrong(cfg: Any, state: Any, accelerator: Any) -> Any:
        step = right(cfg, state, accelerator)
        factor = 2 if cfg.train.step == "fused" else 1
        return lambda inputs, lr: step(inputs, factor * lr)

    monkeypatch.setattr(steps, "make_step", wrong)
    fused = [row.name for row in contenders("cpu") if row.name.startswith(FUSED)]
    document = run_tiny(tmp_path, "--only", "torch-ops sketch", *fused)
    for name, row in by_name(document).items():
        if name in fused:
            assert row["status"] == "wrong", row
            assert "ms" not in row
        else:
            assert row["status"] == "ok", row
    assert "the check is red" in steps_page(document)


def test_a_wrong_reference_voids_what_is_checked_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right = Reference._autograd
    monkeypatch.setattr(
        Reference, "_autograd", lambda self, aux: [1.01 * one for one in right(self, aux)]
    )
    rows = by_name(run_tiny(tmp_path, "--only", FUSED))
    assert rows[FUSED]["status"] == "error"
    assert "a dense forward's" in rows[FUSED]["reason"]
    assert list(rows) == [UNIT, FUSED]


def test_names_are_checked_and_time_runs_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for flags in (["--only", "ours"], ["--shapes", "A"]):
        with pytest.raises(SystemExit):
            bench_step.main([*flags, "--out", str(tmp_path)])
    assert "got 'ours'" in capsys.readouterr().err
    document = run_tiny(tmp_path, "--minutes", "1e-9")
    assert {row["status"] for row in document["rows"]} == {"not run"}


# ---- floors, goals, clocks


def test_floors_are_near_the_byte_models():
    modelled = {"A": 0.87, "B": 5.7, "C": 20.2, "D": 144}
    for name, ms in modelled.items():
        found = floor_ms(step_work(GPU_SHAPES[name], "bf16"), H200)
        assert found == pytest.approx(ms, rel=0.06), name
    wide = step_work(GPU_SHAPES["C"], "bf16", n_dead=8192)
    plain = step_work(GPU_SHAPES["C"], "bf16")
    assert floor_ms(wide, H200) - floor_ms(plain, H200) == pytest.approx(2.78, rel=0.01)
    small = floor_ms(step_work(GPU_SHAPES["D"], "bf16", "8bit"), H200)
    assert floor_ms(step_work(GPU_SHAPES["D"], "bf16"), H200) - small == pytest.approx(
        12 * 2 * 4096 * 2**20 / 4.3e9, rel=1e-6
    )


def test_goals_are_the_published_ones_and_look_the_right_way():
    assert {key: goal.bound for key, goal in H200_GOALS.items() if goal.of == "ms"} == {
        (FUSED, "A"): 1.3,
        (FUSED, "B"): 7.0,
        (FUSED, "C"): 24,
        (f"{FUSED}, AuxK", "A"): 2.0,
        (f"{FUSED}, AuxK", "B"): 9.0,
        (f"{FUSED}, AuxK", "C"): 28,
    }
    names = {name for name, _ in {**CPU_GOALS, **H200_GOALS}}
    assert names <= {row.name for kind in ("cpu", "cuda") for row in contenders(kind)}
    times = {UNIT: 100.0, FUSED: 20.0, "eai-sparsify": 39.0, "dense autograd, bf16": 101.0}
    rows: list[Any] = [{"shape": "C", "contender": name, "ms": ms} for name, ms in times.items()]
    relate(rows, H200_GOALS)
    assert [row.get("goal_met") for row in rows] == [None, True, False, True]
    rows = [
        {"shape": "wide", "contender": name, "ms": ms}
        for name, ms in ((UNIT, 100.0), (FUSED, 136.0), (f"{FUSED}, bf16", 80.0))
    ]
    relate(rows, CPU_GOALS)
    assert [row.get("goal_met") for row in rows] == [None, False, True]


def test_steps_take_turns_and_each_gets_its_fewest():
    order: list[str] = []
    trainees = [Trainee(lambda _, name=name: order.append(name), None, list) for name in "ab"]
    samples = CpuStepClock(seconds=0.0, least=2, most=9).time(trainees, [torch.zeros(1)])
    assert order == ["a", "b", "a", "b"]
    assert [len(taken) for taken in samples] == [2, 2]


def test_the_peak_of_allocations_counts_what_is_freed_again():
    kept = torch.ones(1000)

    def call() -> None:
        first = kept * 2  # 4 kB
        second = first + first  # 4 kB, both there
        del first
        second.add_(1)
        assert float((second + kept).sum()) == 6000  # 4 kB, and a scalar

    assert peak_of_allocations(call) == pytest.approx(8000, abs=200)


def test_log_normal_biases_keep_the_firing_rate():
    task = draw_task(Shape("s", 400, 32, 1000, 10), torch.device("cpu"), "cpu", "log-normal")
    pre_acts = task.xs[0] @ task.weight().T + task.b_enc
    firings = pre_acts.topk(10, dim=1).indices.flatten().bincount(minlength=1000)
    assert len(task.xs) >= 3
    assert firings.max() > 8 * firings.float().mean()


# ---- growth


def test_growth_is_measured_and_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = bench_step.main(["--growth", "--quick", "--out", str(tmp_path)])
    document = json.loads(path.read_text())
    assert document["complete"]
    assert {p["axis"] for p in document["points"]} == set(step_shapes.AXES)
    for point in document["points"]:
        assert point["ours_ms"] > 0
        assert point["matmul_ms"] > 0
        changed = {key for key, size in document["base"].items() if point[key] != size}
        assert changed <= {point["axis"]}
    plot = path.with_suffix(".png")
    assert path.name.endswith("-cpu-growth.json")
    assert plot.read_bytes().startswith(b"\x89PNG")
    page = path.with_suffix(".md").read_text()
    assert f"]({plot.name})" in page
    assert page.count("\n| ") == len(document["points"]) + 2


def test_growth_without_matplotlib_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(step_shapes, "FACTORS", (1.0,))
    path = bench_step.main(["--growth", "--quick", "--out", str(tmp_path)])
    assert "matplotlib is not installed" in path.with_suffix(".md").read_text()
    assert not path.with_suffix(".png").exists()


# ---- the GPU's path, with a stand-in for torch.cuda


class FakeCuda:
    """Does what the clocks ask of torch.cuda, on the CPU; each call is bound to the real one."""

    def __init__(self, total_memory: int = 10**12):
        self.properties = type("P", (), {"total_memory": total_memory, "L2_cache_size": 1})()

    def __getattr__(self, name: str) -> Any:
        real = getattr(torch.cuda, name)
        answers = {
            "current_device": 0,
            "memory_allocated": 100,
            "max_memory_allocated": 10**9,
            "get_device_properties": self.properties,
        }

        def call(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(real).bind(*args, **kwargs)
            return answers.get(name)

        return call

    def stream(self, stream: Any) -> Any:
        inspect.signature(torch.cuda.stream).bind(stream)
        return nullcontext()

    def Stream(self) -> str:
        return "side stream"

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        members = {"record": lambda _: None, "elapsed_time": lambda _, end: 6.0 if end else None}
        assert all(hasattr(torch.cuda.Event, name) for name in members)
        return type("Event", (), members)()


def on_fake_gpu(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    clock = CudaClock(cuda, lambda call, **_: len(str(call())) and 7.0, use_graphs=False)
    monkeypatch.setattr(bench_step, "make_clock", lambda *_: clock)
    monkeypatch.setattr(
        bench_step, "make_step_clock", lambda *_: CudaStepClock(cuda, seconds=0.02, least=2)
    )
    monkeypatch.setattr(ceilings, "GPU_COPY_BYTES", 2**12)
    monkeypatch.setattr(ceilings, "GPU_MATMUL_SIZE", 32)
    monkeypatch.setattr(machine, "device_name", lambda _: "NVIDIA H200")
    monkeypatch.setitem(step_shapes.GPU_SHAPES, "A", TINY._replace(name="A"))


def test_the_gpus_path_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on an H200: bf16 is normal, one contender at a time, events, goals."""
    on_fake_gpu(monkeypatch, FakeCuda())
    path = bench_step.main(["--shapes", "A", "--out", str(tmp_path)])
    document = json.loads(path.read_text())
    rows = by_name(document)
    assert list(rows) == [
        UNIT,
        FUSED,
        f"{FUSED}, AuxK",
        f"{FUSED}, 8-bit moments",
        "ours, autograd",
        "dense autograd, bf16",
        "eai-sparsify",
    ]
    for name, row in rows.items():
        if name not in OWN_PACKAGES:
            assert row["status"] == "ok", row
            assert row["ms"] == 6.0
            assert row["n_samples"] == 3  # 0.02 s of 6 ms
            assert "floor_ms" in row
    assert (rows[FUSED]["goal"], rows[FUSED]["goal_met"]) == ("≤ 1.3 ms", False)
    n_weights = 2 * TINY.d * TINY.d_sae
    kept = 4 * 3 * (n_weights + TINY.d + TINY.d_sae)
    assert rows[FUSED]["extra_memory_bytes"] == 10**9 - 100 - kept
    assert "missed" in path.with_suffix(".md").read_text()


def test_what_cannot_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    n_weights = 2 * TINY.d * TINY.d_sae
    on_fake_gpu(monkeypatch, FakeCuda(total_memory=13 * n_weights))
    flags = ["--only", "ours, autograd", f"{FUSED}, 8-bit moments", FUSED]
    path = bench_step.main(["--shapes", "A", "--out", str(tmp_path), *flags])
    rows = by_name(json.loads(path.read_text()))
    assert rows["ours, autograd"]["status"] == rows[FUSED]["status"] == "does not fit"
    assert rows[f"{FUSED}, 8-bit moments"]["status"] == "ok"
    assert len(rows[f"{FUSED}, 8-bit moments"]["expected_losses"]) == 1
