"""Checkpoints: written whole or not at all, verified before they are trusted.

checkpoints/step_00000250/
    cfg.json, sae_weights.safetensors    the dictionary in raw units, ready to load
    trainer.json, trainer.safetensors    `TrainState`, in training units
    rank_0.json, rank_0.safetensors      each process's lanes (place and buffer) and its counts
    manifest.json                        size and CRC-32 of every other file
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae.coder.dictionary import write_dictionary_files
from sae.files import new_folder, partial_path, read_json, write_json, write_tensors
from sae.stream.source import SourceState
from sae.train.origin import origin
from sae.train.state import TrainState

MANIFEST = "manifest.json"
TRAINER_TENSORS = "trainer.safetensors"
SOURCE = "source."
LANES = "lanes"


def save_checkpoint(state: TrainState, run: Path, accelerator: Accelerator, *, keep: int) -> Path:
    """Write the checkpoint of `state` and remove all but the newest `keep`.

    All processes call this together; the folder must be on a disk that they share.
    """
    path = run / "checkpoints" / f"step_{state.step:08d}"
    rank = accelerator.process_index
    if accelerator.is_main_process:
        remove_leftovers(run)
        with new_folder(path) as beside:
            write_shared(state, beside)
            _write_own(state, beside, rank)
            accelerator.wait_for_everyone()  # the folder is there: the others write theirs
            accelerator.wait_for_everyone()  # they have
            write_json(beside / MANIFEST, fingerprints(beside))
        keep_newest(run, keep)
    else:
        accelerator.wait_for_everyone()
        _write_own(state, partial_path(path), rank)
        accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()
    return path


def load_checkpoint(state: TrainState, path: Path, accelerator: Accelerator) -> None:
    """Continue `state` from the checkpoint at `path`, bit for bit.

    The number of processes may be another than the one that saved it.

    Errors: ValueError for a damaged checkpoint (nothing is changed then).
    """
    verify(path)
    rank, n_saved = accelerator.process_index, len(list(path.glob("rank_*.json")))
    files = [path / f"rank_{number}.safetensors" for number in range(n_saved)]
    if n_saved == accelerator.num_processes:
        own: Mapping[str, Tensor] = TensorFiles([files[rank]])
    else:
        own = state.merged_own([TensorFiles([file]) for file in files], rank)
    own = {name: own[name] for name in state.own_tensors()}
    state.load_(read_json(path / "trainer.json"), {**load_file(path / TRAINER_TENSORS), **own})
    state.source.load_state(_merged_source(files))
    state.coder.metadata |= origin(state.source, state.coder.sites, state.coder.cfg.site)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name, each read when it is asked for."""

    def __init__(self, files: Sequence[Path], prefix: str = ""):
        self.prefix, self._file_of = prefix, {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                names = [name for name in list(opened.keys()) if name.startswith(prefix)]
            self._file_of |= {name.removeprefix(prefix): file for name in names}

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as opened:
            return opened.get_tensor(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _merged_source(files: Sequence[Path]) -> SourceState:
    """Return the source's state with the lanes of every process that saved."""
    positions = [read_json(file.with_suffix(".json")) for file in files]
    position = {**positions[0]}
    if LANES in position:
        position[LANES] = {n: lane for saved in positions for n, lane in saved[LANES].items()}
    return SourceState(position, TensorFiles(files, SOURCE))


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


def fingerprints(folder: Path) -> dict[str, dict[str, int]]:
    """Return those of all files below a folder, by their path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): fingerprint_of(file) for file in files}


def keep_newest(run: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for old in checkpoints(run)[:-keep]:
        _remove(old)


def write_shared(state: TrainState, folder: Path) -> None:
    """Write the dictionary and what is the same on every process."""
    write_dictionary_files(state.raw_coder(), folder)
    write_json(folder / "trainer.json", state.scalars())
    write_tensors(folder / TRAINER_TENSORS, state.tensors())


def _write_own(state: TrainState, folder: Path, rank: int) -> None:
    source = state.source.state()
    tensors = {f"{SOURCE}{name}": tensor for name, tensor in source.tensors.items()}
    write_tensors(folder / f"rank_{rank}.safetensors", {**state.own_tensors(), **tensors})
    write_json(folder / f"rank_{rank}.json", source.position)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; renamed first, so that a half-removed one is never taken for whole."""
    hidden = folder.with_name(f".{folder.name}.removed")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Remove what a kill left half-written or half-removed."""
    for folder in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(folder, ignore_errors=True)
