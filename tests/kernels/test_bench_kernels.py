"""The benchmark's script: what it writes, when it gives no time, its floors, its GPU's logic."""

from __future__ import annotations

import inspect
import json
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import sae_kernels
from sae_kernels import fused_update

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_kernels  # noqa: E402 - a script is not installed
from benchmarking import ceilings, floors, inputs, machine, results, running, shapes  # noqa: E402
from benchmarking.checking import kth_largest, sample_latents  # noqa: E402
from benchmarking.clocks import CpuClock, CudaClock  # noqa: E402
from benchmarking.floors import Ceilings  # noqa: E402
from benchmarking.rows import Row  # noqa: E402
from benchmarking.shapes import Shape  # noqa: E402

TINY = Shape("tiny", 24, 12, 128, 3)
COMPOSED = {"step", "adam"}
UPDATES = {"fused_update_", "dense_update_", "sparse_gradients"}  # of their own module
H200 = Ceilings(4.3e12, 6e12, 790e12, 50_000_000)  # the byte model's device


@pytest.fixture(autouse=True)
def _tiny_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure a tiny shape on the CPU, with ceilings that take no time."""
    monkeypatch.setattr(bench_kernels, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setitem(shapes.CPU_SHAPES, "tiny", TINY)
    monkeypatch.setattr(ceilings, "CPU_COPY_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 32)
    monkeypatch.setattr(bench_kernels, "make_clock", lambda *_: CpuClock(seconds=0.001, most=3))


def run_tiny(out: Path, *flags: str) -> dict[str, Any]:
    path = bench_kernels.main(["--shapes", "tiny", "--out", str(out), *flags])
    return json.loads(path.read_text())


def rows_of(document: dict[str, Any], **wanted: str) -> list[dict[str, Any]]:
    found = [r for r in document["rows"] if all(r[name] == w for name, w in wanted.items())]
    assert found
    return found


def test_a_run_checks_and_times_every_row_and_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    document = run_tiny(tmp_path)
    assert document["complete"]
    assert document["notes"] == [bench_kernels.CPU_NOTE]
    absent_is_fine = {"eai-sparsify's kernel"}
    for row in document["rows"]:
        is_exported = hasattr(sae_kernels, row["op"]) or row["op"] in COMPOSED | UPDATES
        if is_exported and row["contender"] not in absent_is_fine:
            assert row["status"] == "ok", row
            assert row["ms"] > 0
            assert row["over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
    assert {row["firing"] for row in document["rows"]} == {"uniform", "log-normal", None}
    assert {row["op"] for row in document["rows"]} == {row.op for row in running.ROWS}
    name = f"{document['date']}-cpu-kernels"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json", f"{name}.md"}
    page = (tmp_path / f"{name}.md").read_text()
    assert page.count("\n| ") == len(document["rows"]) + 2
    assert document["command"] in page
    assert bench_kernels.CPU_NOTE in page
    assert "copy_bytes_per_s" in capsys.readouterr().out


def test_a_second_run_of_a_day_loses_nothing(tmp_path: Path):
    paths = {
        bench_kernels.main(["--shapes", "tiny", "--ops", "topk", "--out", str(tmp_path)])
        for _ in range(2)
    }
    assert len(paths) == 2
    assert len(list(tmp_path.iterdir())) == 4


def _first_larger(result: Any) -> Any:
    """Return a result whose first tensor is 5% off, whatever its form."""
    if isinstance(result, torch.Tensor):
        return result * 1.05
    changed = _first_larger(result[0])
    if hasattr(result, "_replace"):
        return result._replace(**{result._fields[0]: changed})
    return (changed, *result[1:])


@pytest.mark.parametrize("name", sorted({row.op for row in running.ROWS} - COMPOSED - UPDATES))
def test_a_wrong_op_gets_no_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = getattr(sae_kernels, name, None)
    if right is None:
        pytest.skip(f"sae_kernels does not export {name} yet")
    monkeypatch.setattr(sae_kernels, name, lambda *a, **kw: _first_larger(right(*a, **kw)))
    document = run_tiny(tmp_path, "--ops", name, "--quick")
    wrong = rows_of(document, op=name, contender="auto")
    assert {row["status"] for row in wrong} == {"wrong"}
    assert not any("ms" in row for row in wrong)
    others = [row for row in document["rows"] if row["source"].startswith(("own", "re-"))]
    assert all(row["status"] in ("ok", "absent") for row in others)


WRONG_UPDATES = {
    "swapped": lambda step, d, s, c, g, x, impl: step(d, s, c, x, g, impl=impl),
    "no norm": lambda step, *a, impl: step(*a, unit_norm=False, impl=impl),
    "stale shadow": lambda step, d, *a, impl: step(d._replace(enc_shadow=None), *a, impl=impl),
    "rate": lambda step, d, s, *a, impl: step(
        d, s._replace(rates=s.rates * torch.tensor([1.2, 1, 1])), *a, impl=impl
    ),
}


@pytest.mark.parametrize("name", WRONG_UPDATES)
def test_a_wrong_update_gets_no_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wrong = partial(WRONG_UPDATES[name], fused_update.fused_update_)
    monkeypatch.setattr(fused_update, "fused_update_", wrong)
    document = run_tiny(tmp_path, "--ops", "fused_update_", "--quick")
    assert {row["status"] for row in rows_of(document, contender="auto")} == {"wrong"}


def test_a_selection_that_misses_one_element_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def second_best(x: torch.Tensor, k: int, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert impl
        values, indices = torch.topk(x, k + 1, dim=-1)
        return values[:, 1:], indices[:, 1:]

    monkeypatch.setattr(sae_kernels, "topk", second_best)
    document = run_tiny(tmp_path, "--ops", "topk", "--quick")
    assert rows_of(document, contender="auto", part="forward")[0]["status"] == "wrong"


def test_a_weight_gradient_without_the_hub_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right = sae_kernels.sparse_encoder_grad

    def without_hub(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = right(*args, **kwargs)
        weight[inputs.hub_of(TINY)] *= 0.9
        return weight, bias

    monkeypatch.setattr(sae_kernels, "sparse_encoder_grad", without_hub)
    document = run_tiny(tmp_path, "--ops", "sparse_encoder_grad", "--quick")
    assert rows_of(document, contender="auto")[0]["status"] == "wrong"


def test_a_raising_op_is_recorded_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel\nand much more")

    monkeypatch.setattr(sae_kernels, "sparse_decode", broken)
    document = run_tiny(tmp_path, "--ops", "sparse_decode", "adam", "--quick")
    row = rows_of(document, op="sparse_decode", contender="auto")[0]
    assert row["status"] == "error"
    assert row["reason"] == "RuntimeError: no such kernel"
    assert rows_of(document, op="sparse_decode", contender="F.embedding_bag")[0]["ms"] > 0
    assert rows_of(document, op="adam")[0]["ms"] > 0
    assert "RuntimeError: no such kernel" in next(tmp_path.glob("*.md")).read_text()


def test_an_op_that_fails_only_while_it_is_timed_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right, n_calls = sae_kernels.topk, 0

    def fails_later(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += kwargs["impl"] == "auto"
        if n_calls > 1:
            raise torch.OutOfMemoryError("asked for 17 GB")
        return right(*args, **kwargs)

    monkeypatch.setattr(sae_kernels, "topk", fails_later)
    row = rows_of(run_tiny(tmp_path, "--ops", "topk", "--quick"), contender="auto")[0]
    assert (row["status"], row["reason"]) == ("does not fit", "asked for 17 GB")
    assert "ms" not in row


def test_an_op_that_is_not_exported_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(sae_kernels, "topk")
    row = rows_of(run_tiny(tmp_path, "--ops", "topk", "--quick"), contender="auto")[0]
    assert (row["status"], row["reason"]) == ("absent", "sae_kernels does not export `topk`")


def test_inputs_that_do_not_fit_are_recorded_for_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("asked for 200 GB")

    monkeypatch.setitem(running.DRAWS, "weights", too_much)
    document = run_tiny(tmp_path, "--ops", "adam")
    assert [row["status"] for row in document["rows"]] == ["does not fit"]


def test_rows_that_would_start_too_late_are_not_run(tmp_path: Path):
    document = run_tiny(tmp_path, "--minutes", "0", "--ops", "topk")
    assert document["complete"]
    assert {row["status"] for row in document["rows"]} == {"not run"}
    assert "out of time" in document["rows"][0]["reason"]


def test_a_lost_device_ends_the_measuring_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Lost(CpuClock):
        def settle(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench_kernels, "make_clock", lambda *_: Lost(seconds=0.001, most=3))
    document = run_tiny(tmp_path, "--ops", "topk", "adam", "--quick")
    assert rows_of(document, op="topk", part="forward")[0]["ms"] > 0
    last = rows_of(document, op="adam")[0]
    assert last["status"] == "not run"
    assert "illegal memory access" in last["reason"]
    assert "topk forward" in last["reason"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "Z"], "`--shapes` must be among small, wide, tiny"),
        (["--shapes", "A"], "need a CUDA device"),
        (["--ops", "topq"], "`--ops` must be among topk"),
    ],
)
def test_an_unknown_shape_or_op_is_a_clear_error(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.main([*flags, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


FLOORS = {  # ms, by hand: bytes over 4.3 TB/s (6 from L2), FLOPs over 790 TFLOP/s
    ("topk", "forward"): (0.0936, 0.2497, 0.4994, 3.995),
    ("batch_topk", "forward"): (0.0936, 0.2497, 0.4994, 3.995),
    ("sparse_decode", "forward"): (0.0671, 0.4994, 0.9988, 0.9988),
    ("sparse_decode_loss", "forward"): (0.0671, 0.4994, 0.9988, 0.9988),
    ("sparse_encoder_grad", "the op is a gradient"): (0.0671, 0.3579, 0.7158, 0.7158),
    ("encode_topk", "forward"): (0.4851, 3.0332, 11.634, 93.08),
    ("fused_update_", "both weights, fp32 moments"): (0.3625, 2.3388, 7.9236, 53.37),
    ("adam", "both weights, fp32"): (0.2283, 1.6231, 6.492, 51.94),
}


@pytest.mark.parametrize("op_and_part", FLOORS, ids=" ".join)
def test_floors_are_those_computed_by_hand(op_and_part: tuple[str, str]):
    (row,) = (row for row in running.ROWS if (row.op, row.part) == op_and_part)
    found = [floors.floor_ms(row.work(shape, 2), H200) for shape in shapes.GPU_SHAPES.values()]
    assert found == pytest.approx(FLOORS[op_and_part], rel=1e-3)


def test_goals_are_the_published_ones():
    goals = {(row.op, row.part): row.goals for row in running.ROWS if row.goals}
    assert goals == {
        ("topk", "forward"): {"A": 0.13, "B": 0.33, "C": 0.65},
        ("sparse_decode_loss", "forward"): {"A": 0.10, "B": 0.65, "C": 1.3},
        ("fused_update_", "both weights, fp32 moments"): {"A": 0.50, "B": 2.8, "C": 9.0},
    }


def test_every_op_has_rows():
    ops = {
        name
        for name in sae_kernels.__all__
        if inspect.isfunction(function := getattr(sae_kernels, name))
        and "impl" in inspect.signature(function).parameters
    }
    assert ops <= {row.op for row in running.ROWS}
    assert {row.op for row in running.ROWS if "backward" in row.part} == {
        "topk",
        "batch_topk",
        "threshold_select",
        "sparse_decode",
        "sparse_decode_loss",
        "encode_topk",
        "step",
    }


def test_codes_have_distinct_latents_and_a_hub():
    shape = Shape("s", 200, 8, 1000, 10)
    draw = inputs.Draw(torch.device("cpu"), torch.float32, 0, torch.Generator().manual_seed(0))
    for firing in shapes.FIRINGS:
        sets = inputs.draw_codes(draw, shape, firing)
        assert len(sets) == inputs.MIN_SETS
        indices = sets[0].indices
        assert bool((indices.sort(1).values.diff(dim=1) > 0).all())
        firings = indices.flatten().bincount(minlength=1000)
        has_hub = firing == "log-normal"
        assert (int(firings[inputs.hub_of(shape)]) == 200) == has_hub
        pre_acts = inputs.draw_pre_acts(draw, shape, firing)[0]
        above = pre_acts.x > pre_acts.theta
        assert float(above.sum(1).float().mean()) == pytest.approx(10 + has_hub, rel=0.15)
        assert bool(above[:, inputs.hub_of(shape)].all()) == has_hub
        assert pre_acts.capacity > int(above.sum())


def test_sets_are_together_larger_than_l2():
    draw = inputs.Draw(torch.device("cpu"), torch.float32, 10**6, torch.Generator())
    assert draw.n_sets(10**4) * 10**4 > 10**6
    assert draw.n_sets(10**9) == inputs.MIN_SETS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kth_largest_by_bisection(dtype: torch.dtype, generator: torch.Generator):
    x = torch.randn(30, 40, generator=generator).to(dtype)
    ordered = x.flatten().sort(descending=True).values
    for k in (1, 2, 77, 1199, 1200):
        assert kth_largest(x, k) == float(ordered[k - 1])


def test_the_latent_that_fires_most_is_always_checked():
    indices = torch.arange(9000).reshape(3000, 3) + 10
    indices[5:9, 1] = 4  # four times, and not where pairs are sampled
    latents = sample_latents(indices, 10_000).tolist()
    assert {4, 9999} <= set(latents)
    assert len(latents) < 100


def test_contenders_take_turns():
    order: list[str] = []
    CpuClock(seconds=10, most=2).time([[lambda: order.append("a")], [lambda: order.append("b")]])
    assert order == ["a", "b", "a", "b"]


# ---- the GPU's clock, with a stand-in for torch.cuda


class FakeCuda:
    """Does what the clock asks of torch.cuda, on the CPU; each call is bound to the real one."""

    def __init__(self, capture_error: Exception | None = None, l2_bytes: int = 1):
        self.capture_error, self.l2_bytes = capture_error, l2_bytes
        self.is_capturing = self.refuses_sync = False
        self.log: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(torch.cuda, name)
        answers = {
            "current_device": 0,
            "memory_allocated": 100,
            "max_memory_allocated": 130,
            "get_device_properties": type("Properties", (), {"L2_cache_size": self.l2_bytes})(),
        }

        def call(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(real).bind(*args, **kwargs)
            self.log.append(name)
            return answers.get(name)

        return call

    def set_sync_debug_mode(self, mode: str) -> None:
        assert mode in ("default", "error")
        self.refuses_sync = mode == "error"

    def wait(self) -> None:
        """Stand for an op that waits for the device."""
        assert not self.is_capturing
        if self.refuses_sync:
            raise RuntimeError("called a synchronizing CUDA operation")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        inspect.signature(torch.cuda.stream).bind(stream)
        yield

    def Stream(self) -> str:
        return "side stream"

    def CUDAGraph(self) -> Any:
        for name in ("replay", "reset"):
            assert callable(getattr(torch.cuda.CUDAGraph, name))
        return type("Graph", (), {"replay": lambda _: None, "reset": lambda _: None})()

    @contextmanager
    def graph(self, graph: Any, **kwargs: Any) -> Iterator[None]:
        inspect.signature(torch.cuda.graph).bind(graph, **kwargs)
        assert kwargs["stream"] == "side stream"
        if self.capture_error:
            raise self.capture_error
        self.log.append("graph")
        self.is_capturing = True
        yield
        self.is_capturing = False

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        members = {
            "record": lambda _: None,
            "synchronize": lambda _: None,
            "elapsed_time": lambda _, end: 6.0 if end else None,
        }
        assert all(hasattr(torch.cuda.Event, name) for name in members)
        return type("Event", (), members)()


def fake_do_bench(call: Any, *, warmup: float, rep: float, return_mode: str) -> float:
    from triton.testing import do_bench

    inspect.signature(do_bench).bind(call, warmup=warmup, rep=rep, return_mode=return_mode)
    assert return_mode == "median"
    call()
    return 7.0


def test_calls_that_never_wait_are_replayed_as_a_graph():
    cuda, seen = FakeCuda(), []
    clock = CudaClock(cuda, fake_do_bench)
    (timing,) = clock.time([[lambda: seen.append(cuda.is_capturing)] * 3])
    assert timing.method == "graph"
    assert timing.ms == 6.0 / 3  # one pass over three calls fills the graph
    assert seen.count(True) == 3
    assert clock.l2_bytes == 1


def test_calls_that_wait_are_never_captured():
    cuda = FakeCuda()
    clock = CudaClock(cuda, fake_do_bench)
    (timing,) = clock.time([[cuda.wait]])
    assert timing.method == "do_bench"
    assert timing.ms == 7.0
    assert "graph" not in cuda.log
    assert not cuda.refuses_sync
    assert clock.use_graphs


@pytest.mark.parametrize(
    ("error", "keeps_graphs"),
    [(RuntimeError("operation not permitted"), False), (torch.OutOfMemoryError("full"), True)],
)
def test_a_failed_capture_falls_back(error: Exception, keeps_graphs: bool):
    clock = CudaClock(FakeCuda(error), fake_do_bench)
    (timing,) = clock.time([[lambda: None]])
    assert timing.method == "do_bench"
    assert clock.use_graphs is keeps_graphs
    assert bool(clock.notes) is not keeps_graphs
    assert "operation not permitted" in "".join(clock.notes) or keeps_graphs
    clock.settle()


def test_the_l2s_rate_leaves_out_what_a_launch_costs(monkeypatch: pytest.MonkeyPatch):
    clock = CudaClock(FakeCuda(l2_bytes=2**20), fake_do_bench)
    launch_s, rate = 1e-5, 6e12
    monkeypatch.setattr(
        ceilings,
        "_copy_seconds",
        lambda _, __, n_bytes, in_l2: launch_s + in_l2 * 2 * n_bytes / rate,
    )
    assert ceilings.l2_rate(clock, torch.device("cpu"), 4.3e12) == pytest.approx(rate)
    assert ceilings.l2_rate(clock, torch.device("cpu"), 1e12) == 4e12  # held within reason
    assert ceilings.l2_rate(clock, torch.device("cpu"), 7e12) == 7e12
    assert not clock.notes
    clock.use_graphs = False
    assert ceilings.l2_rate(clock, torch.device("cpu"), 4.3e12) == 4.3e12
    assert "could not be measured" in clock.notes[0]


def _mostly_without_interpreter(row: Row) -> Row:
    """Let kernels run in topk and sparse_decode only: in the interpreter they take seconds."""
    if (row.op, row.part) in (("topk", "forward"), ("sparse_decode", "forward")):
        return row
    auto = row.contenders[0].prepare
    contenders = (c._replace(prepare=auto) if c.name == "triton" else c for c in row.contenders)
    return replace(row, contenders=tuple(contenders))


def test_the_gpus_path_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on an H200: bfloat16, kernels by name, one contender at a time, graphs, goals."""
    cuda = FakeCuda()
    monkeypatch.setattr(bench_kernels, "make_clock", lambda *_: CudaClock(cuda, fake_do_bench))
    monkeypatch.setattr(ceilings, "GPU_COPY_BYTES", 2**12)
    monkeypatch.setattr(ceilings, "GPU_MATMUL_SIZE", 32)
    monkeypatch.setattr(machine, "device_name", lambda _: "NVIDIA H200")
    monkeypatch.setitem(shapes.CPU_SHAPES, "A", Shape("A", 4, 16, 64, 2))
    monkeypatch.setattr(inputs, "MIN_SETS", 1)
    monkeypatch.setattr(running, "ROWS", [_mostly_without_interpreter(r) for r in running.ROWS])
    path = bench_kernels.main(["--shapes", "A", "--quick", "--out", str(tmp_path)])
    document = json.loads(path.read_text())
    assert document["inputs"].startswith("bfloat16")
    for row in document["rows"]:
        if row["source"].startswith("ours"):
            assert row["status"] in ("ok", "absent"), row
        if row["status"] == "ok":
            assert row["extra_memory_bytes"] == 30
    ours = rows_of(document, op="topk", part="forward", contender="triton")[0]
    assert ours["method"] == "graph"
    auto = rows_of(document, op="topk", part="forward", contender="auto")[0]
    assert (auto["goal_ms"], auto["goal_met"]) == (0.13, False)
    assert rows_of(document, op="adam")[0]["method"] == "do_bench"
    assert "missed" in path.with_suffix(".md").read_text()


def test_a_gpu_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho '580.159.03, 345 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 700.00 W, 31'\n"
    )
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine.describe(device, "abc")
    assert found["device"] == "NVIDIA H200"
    assert found["commit"] == "abc"
    assert found["gpu"] == dict(
        zip(
            machine.GPU_FIELDS,
            ("580.159.03", "345 MHz", "3201 MHz", "1980 MHz", "3201 MHz", "700.00 W", "31"),
            strict=True,
        )
    )
    assert machine.slug(device) == "nvidia-h200"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpu_state() is None


def test_a_run_that_did_not_end_says_so(tmp_path: Path):
    document = run_tiny(tmp_path, "--ops", "topk", "--quick") | {"complete": False}
    assert "The run did not end" in results.as_markdown(document)
