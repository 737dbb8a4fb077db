"""What ran: device, clocks, driver, versions, commit."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "eai-sparsify")
GPU_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
)


def describe(device: torch.device, commit: str | None) -> dict[str, object]:
    """Return the machine's description, as JSON has it; what cannot be found out is None."""
    found_commit, is_dirty = _commit()
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu_threads": torch.get_num_threads(),
        "gpu": gpu_state() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "packages": {package: package_version(package) for package in PACKAGES},
        "commit": commit or found_commit,
        "uncommitted_changes": None if commit else is_dirty,
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {_processor()}".strip()


def slug(device: torch.device) -> str:
    """Return the device's name as a part of a file's name: nvidia-h200, cpu."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device).lower()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def gpu_state() -> dict[str, str] | None:
    """Return what nvidia-smi says of the first GPU now: driver, clocks, limits; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = [
        "nvidia-smi",
        "--id=0",
        f"--query-gpu={','.join(GPU_FIELDS)}",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(GPU_FIELDS):
        return None
    return dict(zip(GPU_FIELDS, values, strict=True))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} logical cores"
    return platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit and whether tracked files differ from it."""
    commit, changes = _git("rev-parse", "HEAD"), _git("diff", "HEAD", "--stat")
    return commit or None, None if commit is None or changes is None else bool(changes)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
