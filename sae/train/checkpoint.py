"""Checkpoints: written whole or not at all, verified before they are trusted.

checkpoints/step_00000250/
    cfg.json, sae_weights.safetensors    the dictionary in raw units, ready to load
    trainer.json, trainer.safetensors    `TrainState`, in training units
    source_0.json, source_0.safetensors  each process's place in the stream, with its buffer
    manifest.json                        size and CRC-32 of every other file
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from sae.coder import to_raw_units
from sae.coder.dictionary import write_dictionary_files
from sae.files import explained_write, new_folder, read_json, write_json, write_tensors
from sae.stream.source import SourceState
from sae.train.state import TrainState

MANIFEST = "manifest.json"


def save_checkpoint(state: TrainState, run: Path, accelerator: Accelerator, *, keep: int) -> Path:
    """Write the checkpoint of `state` and remove all but the newest `keep`.

    All processes call this together; the folder must be on a disk that they share.
    """
    path = run / "checkpoints" / f"step_{state.step:08d}"
    if accelerator.is_main_process:
        with new_folder(path) as beside:
            _write_shared(state, beside)
            _write_source(state, beside, accelerator)
            accelerator.wait_for_everyone()
            accelerator.wait_for_everyone()
            write_json(beside / MANIFEST, _fingerprints(beside))
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    else:
        accelerator.wait_for_everyone()
        _write_source(state, path.with_name(f".{path.name}.partial"), accelerator)
        accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()
    return path


def load_checkpoint(state: TrainState, path: Path, accelerator: Accelerator) -> None:
    """Continue `state` from the checkpoint at `path`, bit for bit.

    Errors: ValueError for a damaged checkpoint (nothing is changed then) and for one of another
    number of processes.
    """
    verify(path)
    n_sources = len(list(path.glob("source_*.json")))
    if n_sources != accelerator.num_processes:
        raise ValueError(
            f"a run must be resumed on as many processes as it was saved on; {path.name} was saved "
            f"by {n_sources}, now {accelerator.num_processes} run. Launch {n_sources}."
        )
    rank = accelerator.process_index
    source = load_file(path / f"source_{rank}.safetensors")
    position = read_json(path / f"source_{rank}.json")
    source.pop("empty", None)
    state.load_(read_json(path / "trainer.json"), load_file(path / "trainer.safetensors"))
    state.source.load_state(SourceState(position, source))


def checkpoints(run: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first; half-written ones are not among them."""
    return sorted((run / "checkpoints").glob("step_*"))


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Errors: ValueError naming the file that is missing, truncated or changed, and the checkpoint to
    fall back on.
    """
    older = [p.name for p in checkpoints(path.parent.parent) if p.name < path.name]
    advice = f"Remove the folder {path} to continue from " + (
        f"{older[-1]}." if older else "the beginning."
    )
    if not (path / MANIFEST).exists():
        raise ValueError(f"`{path}` must hold {MANIFEST}; it is missing. {advice}")
    expected = read_json(path / MANIFEST)
    for name, fingerprint in expected.items():
        file = path / name
        given = fingerprint_of(file) if file.exists() else None
        if given != fingerprint:
            raise ValueError(
                f"`{file}` must be as it was written ({fingerprint}); got {given}. The checkpoint "
                f"is damaged. {advice}"
            )


def fingerprint_of(file: Path) -> dict[str, int]:
    """Return a file's size in bytes and CRC-32."""
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": file.stat().st_size, "crc32": checksum}


def _fingerprints(folder: Path) -> dict[str, dict[str, int]]:
    return {file.name: fingerprint_of(file) for file in sorted(folder.iterdir())}


def _write_shared(state: TrainState, folder: Path) -> None:
    write_dictionary_files(to_raw_units(state.coder, state.calibration.scale), folder)
    write_json(folder / "trainer.json", state.scalars())
    write_tensors(folder / "trainer.safetensors", state.tensors())


def _write_source(state: TrainState, folder: Path, accelerator: Accelerator) -> None:
    rank, source = accelerator.process_index, state.source.state()
    with explained_write(folder):
        # safetensors cannot hold no tensor at all.
        tensors = source.tensors or {"empty": torch.zeros(1)}
        write_tensors(folder / f"source_{rank}.safetensors", tensors)
        write_json(folder / f"source_{rank}.json", source.position)
