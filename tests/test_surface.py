"""The public names, the direction of imports, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sae
import sae.coder
import sae_kernels

ROOT = Path(__file__).parent.parent
# Lower levels never import higher ones; rooms on one level may import each other only where listed.
LEVELS = {
    "config": 0,
    "configuration": 1,
    "axes": 0,
    "files": 0,
    "sae_kernels": 0,
    "coder": 2,
    "stream": 3,
    "worlds": 3,
    "interop": 3,
    "evals": 4,
    "train": 5,
    "analysis": 5,
    "cli": 6,
    "__main__": 7,
}
# A world hands out its samples as what the trainer reads, an ActivationSource with its SourceState.
ALLOWED_SIDEWAYS: set[tuple[str, str]] = {("worlds", "stream")}
ONLY_IN = {
    "accelerate": ("train", "scripts"),
    "wandb": ("train",),
    "transformers": ("stream", "analysis"),
    "datasets": ("stream", "analysis"),
    "triton": ("sae_kernels",),
}


def rooms() -> list[tuple[str, Path]]:
    library = [(path.relative_to(ROOT / "sae"), path) for path in (ROOT / "sae").rglob("*.py")]
    kernels = [("sae_kernels", path) for path in (ROOT / "kernels").rglob("*.py")]
    return [(rel.parts[0].removesuffix(".py"), path) for rel, path in library] + kernels


def imported_modules(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.append(node.module)
    return names


def test_public_names():
    assert set(sae.__all__) == {"Config", "Latents", "SparseCoder", "fit", "load"}
    assert {"topk", "sparse_decode"} <= set(sae_kernels.__all__)
    for name in sae.__all__:
        assert getattr(sae, name) is not None
    with pytest.raises(AttributeError, match="offers"):
        sae.lod  # noqa: B018


def test_imports_go_downwards():
    for room, path in rooms():
        if room == "__init__":
            continue
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[0] not in ("sae", "sae_kernels"):
                continue
            target = parts[1] if parts[0] == "sae" and len(parts) > 1 else parts[0]
            if target in (room, "sae"):
                continue
            is_down = LEVELS[target] < LEVELS[room] or (room, target) in ALLOWED_SIDEWAYS
            assert is_down, f"{path.relative_to(ROOT)} imports {module}, which is not below it"


def test_heavy_packages_stay_in_their_rooms():
    for room, path in rooms():
        for module in imported_modules(path):
            package = module.split(".")[0]
            allowed = ONLY_IN.get(package)
            assert allowed is None or room in allowed, f"{path.relative_to(ROOT)} imports {package}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import sae", ["torch", "transformers", "datasets", "wandb", "accelerate"]),
        ("import sae.config, sae.configuration", ["torch", "numpy"]),
        ("import sae.cli", ["torch", "numpy"]),
        ("import sae.coder", ["transformers", "datasets", "wandb"]),
        ("import sae.train", ["transformers", "datasets", "wandb"]),
    ],
)
def test_importing_is_light_and_silent(statement: str, absent: list[str]):
    check = f"{statement}; import sys; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def test_kernels_import_without_triton():
    """As on macOS: the ops are there, and take their torch forms."""
    check = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, sae_kernels\n"
        "values, _ = sae_kernels.topk(torch.arange(6.0), 2)\n"
        "assert sorted(values.tolist()) == [4.0, 5.0]\n"
        "try:\n    sae_kernels.topk(torch.zeros(3), 1, impl='triton')\n"
        "except RuntimeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "the package `triton` is not installed" in done.stdout
