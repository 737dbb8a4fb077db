"""A fleet's checkpoints: the stream's place once, and every member's state.

checkpoints/step_00000250/
    stream.json, stream.safetensors      the lanes: places and buffers
    k16_seed0/                           each member, by its name
        cfg.json, sae_weights.safetensors    the dictionary in raw units, ready to load
        trainer.json, trainer.safetensors    `TrainState`, in training units
        counts.safetensors                   what the log and the dead list have counted
    manifest.json                        size and CRC-32 of every other file

Written whole or not at all, and verified, as in `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from sae.files import new_folder, read_json, write_json, write_tensors
from sae.stream.source import ActivationSource, SourceState
from sae.train.checkpoint import (
    MANIFEST,
    TRAINER_TENSORS,
    TensorFiles,
    fingerprints,
    keep_newest,
    remove_leftovers,
    verify,
    write_shared,
)
from sae.train.origin import origin
from sae.train.state import TrainState

COUNTS = "counts.safetensors"


def save_fleet(
    states: Mapping[str, TrainState], source: ActivationSource, folder: Path, *, keep: int
) -> Path:
    """Write the checkpoint of all `states`, by member, and remove all but the newest `keep`."""
    step = next(iter(states.values())).step
    path = folder / "checkpoints" / f"step_{step:08d}"
    remove_leftovers(folder)
    with new_folder(path) as beside:
        place = source.state()
        write_tensors(beside / "stream.safetensors", place.tensors)
        write_json(beside / "stream.json", place.position)
        for name, state in states.items():
            (beside / name).mkdir()
            write_shared(state, beside / name)
            write_tensors(beside / name / COUNTS, state.own_tensors())
        write_json(beside / MANIFEST, fingerprints(beside))
    keep_newest(folder, keep)
    return path


def load_fleet(states: Mapping[str, TrainState], source: ActivationSource, path: Path) -> None:
    """Continue all `states` and the stream from the checkpoint at `path`, bit for bit.

    Errors: ValueError for a damaged checkpoint (nothing is changed then).
    """
    verify(path)
    for name, state in states.items():
        member = path / name
        tensors = {**load_file(member / TRAINER_TENSORS), **load_file(member / COUNTS)}
        state.load_(read_json(member / "trainer.json"), tensors)
    tensors = TensorFiles([path / "stream.safetensors"])
    source.load_state(SourceState(read_json(path / "stream.json"), tensors))
    for state in states.values():
        state.coder.metadata |= origin(state.source, state.coder.sites, state.coder.cfg.site)
