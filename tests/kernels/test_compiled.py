"""The kernels as a GPU would run them: `scripts/compile_kernels.py` gates them, and can fail.

Everything that compiles runs in processes of its own, since kernels are interpreted in this one.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")

# A shared machine may take several times as long as an idle one's half minute a test.
pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
GATE, TOYS = "scripts/compile_kernels.py", "tests/kernels/gate_toys.py"
PACKAGE = ROOT / "kernels" / "sae_kernels"
TRITON_36 = Path(sys.prefix) / "triton-3.6"  # where scripts/install.py puts it
# Each kernel and its ties, strides and empty rows; of the error law's many cases, the hubs, and of
# an update's moments, those of 8 bits. What torch.compile and opcheck see of an op does not depend
# on Triton, nor whether two runs of it agree.
FOR_TRITON_36 = (
    "triton and not compile and not opcheck and not reproducible and not recommended "
    "and not shadow and not fp32-triton and not bf16-triton and (not law or hub)"
)
needs_triton_36 = pytest.mark.skipif(
    not TRITON_36.exists(), reason="python3 scripts/install.py dev triton36 brings Triton 3.6"
)


def run_python(
    *words: object, path: tuple[Path, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's root without the interpreter of kernels."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [*path, ROOT / "scripts", ROOT / "kernels", ROOT, os.environ.get("PYTHONPATH", "")]
    kept["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders if str(folder))
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=kept | variables,
    )


def gated_rows(folder: Path, *flags: object, path: tuple[Path, ...] = ()) -> list[dict]:
    """Run the gate, demand that it passes, and return its rows."""
    out = folder / "rows.json"
    done = run_python(GATE, *flags, "--json", out, path=path)
    refused = re.findall(r".*\n +REFUSED(?:.|\n)*?compiled for .*", done.stdout)
    assert done.returncode == 0, "\n".join(refused) or done.stderr
    return json.loads(out.read_text())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("compile_kernels")
    sys.modules.pop("compile_kernels")


# All of them take some minutes: `python scripts/compile_kernels.py`. These differ the most.
@pytest.mark.parametrize(
    ("arch", "shapes", "dtype"),
    [
        (90, ("C", "odd"), "bf16"),
        (90, ("one",), "fp32"),
        (80, ("A",), "fp32"),
        (100, ("C",), "bf16"),
    ],
)
def test_kernels_pass_the_gate(
    tmp_path: Path, gate: ModuleType, arch: int, shapes: tuple[str, ...], dtype: str
) -> None:
    rows = gated_rows(tmp_path, "--arch", arch, "--shapes", *shapes, "--dtypes", dtype)
    recorded = [
        gate.record(op, gate.SHAPES[shape], gate.DTYPES[dtype])
        for op in gate.CASES
        for shape in shapes
    ]
    # Ops that share a kernel may need the same one, which is compiled once.
    assert {row["kernel"] for row in rows} == {
        gate.kernel_name(launch) for launches in recorded for launch in launches
    }
    assert {row["arch"] for row in rows} == {arch}
    assert all(row["registers"] > 0 and row["global_loads"] > 0 for row in rows)


# ---- nothing is launched past the gate


def launched_kernels() -> set[str]:
    """The kernels that the package's code passes to `launch`, found without running it."""
    names = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            is_launch = isinstance(node.func, ast.Name) and node.func.id == "launch"
            if is_launch:
                kernel = node.args[0]
                assert isinstance(kernel, ast.Name), f"{path.name}:{node.lineno}: name the kernel"
                names.add(kernel.id)
            opens_another_door = isinstance(node.func, ast.Subscript)
            assert not opens_another_door or path.name == "launching.py", (
                f"{path.name}:{node.lineno}: kernels are started by `launch` alone"
            )
    return names


def recorded_kernels(gate: ModuleType, op: str) -> set[str]:
    """The kernels that the gate compiles for an op at any shape."""
    return {
        gate.kernel_name(launch)
        for shape in gate.SHAPES.values()
        for launch in gate.record(op, shape, gate.DTYPES["bf16"])
    }


def test_every_launched_kernel_is_gated(gate: ModuleType) -> None:
    launched = launched_kernels()
    assert len(launched) >= 4
    assert launched == {name for op in gate.CASES for name in recorded_kernels(gate, op)}


def test_wide_loads_are_demanded_of_kernels_that_exist(gate: ModuleType) -> None:
    for op, case in gate.CASES.items():
        assert set(case.streaming) <= recorded_kernels(gate, op), op


# ---- the gate can fail


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, dict], str]:
    """The gate's exit code, its rows by toy, and what it printed."""
    out = tmp_path_factory.mktemp("toys") / "rows.json"
    flags = ("--arch", 90, "--shapes", "A", "--dtypes", "fp32", "--json", out)
    done = run_python(TOYS, *flags)
    assert out.exists(), done.stderr
    return done.returncode, {row["op"]: row for row in json.loads(out.read_text())}, done.stdout


@pytest.mark.parametrize(
    ("toy", "rule"),
    [
        ("spilling", "spills: "),
        ("capped", "spills: "),
        ("sharing", "shared memory: 262144 bytes of 232448"),
        ("unaligned", "wide loads: none of 8 "),
        ("atomic", "atomics: "),
        ("masked", "masks: 1 "),
        ("crowding", "grid: (1, 65536) "),
        ("wrong", "compiles: CompilationError: "),
    ],
)
def test_gate_names_the_rule_that_a_kernel_breaks(toys, toy: str, rule: str) -> None:
    _, rows, printed = toys
    broken = rows[toy]["broken"]
    assert len(broken) == 1
    assert broken[0].startswith(rule)
    assert f"REFUSED, {rule}" in printed


def test_gate_passes_a_good_kernel_and_fails_as_a_whole(toys) -> None:
    exit_code, rows, printed = toys
    assert rows["good"]["broken"] == []
    assert rows["good"]["wide_loads"] == rows["good"]["global_loads"] > 0
    assert "empty" not in rows  # no program is launched, so none is compiled
    assert exit_code == 1
    assert "9 kernels compiled" in printed
    assert "8 refused" in printed


def test_arguments_are_specialised_as_at_a_launch(toys) -> None:
    _, rows, _ = toys
    assert rows["capped"]["arguments"].endswith("WIDTH: constexpr 2048, maxnreg: 32")
    shared = "x: *fp32 D, out: *fp32 D, stride: "
    assert rows["good"]["arguments"] == f"{shared}i32 D, n: i64 D, WIDTH: constexpr 1024"
    assert rows["unaligned"]["arguments"] == f"{shared}i32, n: constexpr 1, WIDTH: constexpr 1024"


@pytest.mark.parametrize(
    ("instruction", "figures"),
    [
        ("@!P0 LDG.E.128 R8, desc[UR8][R2.64]", {"global_loads", "wide_loads"}),
        ("LDG.E.ENL2.256 R8, R4, desc[UR8][R2.64]", {"global_loads", "wide_loads"}),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R9], [R2.64]", {"global_loads", "wide_loads"}),
        ("@P1 LDG.E.LTC128B.64 R8, [R2.64]", {"global_loads"}),
        ("LDL.LU R0, [R1]", {"local_loads"}),
        ("@P0 STL.64 [R1+0x8], R2", {"local_stores"}),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5", {"atomics"}),
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5", {"atomics"}),
        ("ATOM.E.CAS.STRONG.GPU PT, R5, [R2], R4, R5", {"atomics"}),
        ("@P0 ATOMG.E.ADD.STRONG.GPU PT, R5, [R2.64], R5", {"atomics"}),
        ("REDUX.SUM UR5, R2", set()),  # within a warp
        ("ATOMS.POPC.INC.32 RZ, [R2+URZ]", set()),  # on shared memory: a histogram's counts
        ("LDS.128 R4, [R2]", set()),
    ],
)
def test_instructions_are_counted(gate: ModuleType, instruction: str, figures: set[str]) -> None:
    text = f"        /*01f0*/        {instruction} ;     /* 0x0000000802088981 */\n"
    counts = gate.count_memory_accesses(text)
    assert {name for name, count in counts.items() if count} == figures


# ---- one specialisation is compiled once


def test_shapes_of_one_specialisation_share_a_row(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    flags = ("--arch", 90, "--shapes", "A", "C", "--ops", "good", "--json", out)
    assert run_python(TOYS, *flags).returncode == 0
    (row,) = json.loads(out.read_text())
    assert row["shapes"] == "A C"


# ---- what it cannot do, it refuses


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--arch", "75"), "argument --arch: invalid choice: 75 (choose from 80, 90, 100)"),
        (("--shapes", "Z"), "argument --shapes: invalid choice: 'Z'"),
        (("--ops", "tpok"), "argument --ops: invalid choice: 'tpok'"),
    ],
)
def test_unknown_choices_are_refused(
    gate: ModuleType, flags: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gate.main(flags)
    assert message in capsys.readouterr().err


def test_the_interpreter_is_refused(
    gate: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        gate.main([])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_a_missing_triton_is_refused(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('hidden')\n")
    done = run_python(GATE, path=(tmp_path,))
    assert done.returncode == 2
    assert "the package `triton` must be installed" in done.stderr


# ---- an older Triton


@pytest.mark.slow
@needs_triton_36
def test_kernels_pass_the_gate_with_triton_36(tmp_path: Path) -> None:
    flags = ("--arch", 90, "--shapes", "A", "--dtypes", "bf16")
    assert gated_rows(tmp_path, *flags, path=(TRITON_36,))


@pytest.mark.slow
@needs_triton_36
@pytest.mark.parametrize("part", ["", "not "])
def test_kernels_are_interpreted_by_triton_36(part: str) -> None:
    version = run_python("-c", "import triton; print(triton.__version__)", path=(TRITON_36,))
    assert version.stdout.startswith("3.6.")
    done = run_python(
        *("-m", "pytest", "tests/kernels", "-q", "-k", f"{FOR_TRITON_36} and {part}update"),
        # NumPy before 2.4 warns where later ones raise.
        *("-W", "ignore:Conversion of an array with ndim:DeprecationWarning"),
        path=(TRITON_36,),
    )
    assert done.returncode == 0, done.stdout[-4000:]
