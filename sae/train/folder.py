"""The run folder: what it holds, and that it is never taken for another run's.

config.yaml (resolved), env.json, metrics.jsonl, checkpoints/, final/, what eval and report add.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sae.config import Config
from sae.configuration import CONFIG_FILE, flatten, read_run_config, to_yaml
from sae.files import write_json, write_text

# What may differ between a run and its continuation: nothing that changes the numbers.
MAY_DIFFER = (
    *("run.folder", "run.trackers", "run.wandb_project", "run.device", "train.resume"),
    *("model.device", "stream.device"),
)
MAY_DIFFER_PREFIXES = (
    *("eval.", "report.", "harvest.", "stream.resident_", "stream.refill"),
    *("train.keep_", "train.checkpoint_", "train.log_"),
)
EARLY_FILES = {CONFIG_FILE, "env.json", "metrics.jsonl", "checkpoints", "tensorboard", "wandb"} | {
    "wandb_id.txt"
}
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "triton", "numpy")


def require_free(folder: Path, cfg: Config) -> None:
    """Refuse a folder that holds another run, or anything else, before work starts."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`run.folder` must be a folder; {folder} is a file. Choose another.")
    if not folder.exists() or holds_no_result(folder):
        return
    if not (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"`run.folder` must be new, empty or a run; {folder} holds other files. "
            "Choose another folder."
        )
    if cfg.train.resume == "never":
        raise ValueError(
            f"`run.folder` must be new or empty; {folder} already holds a run. Give "
            "`--train.resume auto` to continue it, or another `--run.folder`."
        )


def require_same(folder: Path, cfg: Config) -> None:
    """Refuse to continue a run under settings that would make it another run."""
    if holds_no_result(folder):
        return
    before, now = flatten(read_run_config(folder)), flatten(cfg)
    changed = [key for key in now if before[key] != now[key] and not _may_differ(key)]
    if changed:
        listed = "; ".join(f"{key} was {before[key]!r}, now {now[key]!r}" for key in changed)
        raise ValueError(
            f"`run.folder` must hold the same run to be resumed; in {folder} {listed}. "
            "Give the same settings, or another `--run.folder`."
        )


def saved_lanes(folder: Path) -> int | None:
    """Return the lanes that a folder's run divides its text into; None where there is no run."""
    if holds_no_result(folder):
        return None
    return read_run_config(folder).stream.lanes


def write_run_files(folder: Path, cfg: Config, device: torch.device, n_processes: int) -> None:
    """Write `config.yaml` and `env.json`."""
    write_text(folder / CONFIG_FILE, to_yaml(cfg))
    write_json(folder / "env.json", environment(device, n_processes))


def environment(device: torch.device, n_processes: int) -> dict[str, object]:
    """Return what a run ran on: versions, device, commit of the working directory."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in ("sae", *PACKAGES)},
        "device": f"{device.type} {name}".strip(),
        "threads": torch.get_num_threads(),
        "processes": n_processes,
        "commit": _commit(),
        "command": " ".join(sys.argv),
    }


def holds_no_result(folder: Path) -> bool:
    """Say whether a folder is empty, or holds a run that ended before its first checkpoint.

    The run may be a fleet, with folders of members that hold no more.
    """
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    has_result = "final" in names or any((folder / "checkpoints").glob("step_*"))
    others = [folder / name for name in names - EARLY_FILES]
    return not has_result and all(CONFIG_FILE in names and _is_early(path) for path in others)


def _is_early(member: Path) -> bool:
    is_run = member.is_dir() and (member / CONFIG_FILE).exists()
    return is_run and holds_no_result(member)


def _may_differ(key: str) -> bool:
    return key in MAY_DIFFER or key.startswith(MAY_DIFFER_PREFIXES)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
