"""A harvest of the tiny language model, and a program that harvests and is killed.

As a program: `python harvest_cases.py CONFIG.yaml FOLDER SEED`. It opens the model once, and then
harvests in children that are killed with signal 9, at a random one of their writes or at a random
time, until one ends by itself. It prints how many were killed, and how many numbers of shards these
had left.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sae.config import Config
from sae.configuration import from_flat, read_yaml
from sae.stream import harvest as harvesting
from sae.stream.manifest import MANIFEST, Manifest


def configured(folder: Path, lm_folder: Path, text_file: Path, **changed: object) -> Config:
    """Return a harvest of two hookpoints that takes about half a second: some ten shards."""
    flat = {
        "model.name": str(lm_folder),
        "model.hookpoint": "model.layers.1, layers.2.mlp:in",
        "model.dtype": "float32",
        "data.source": str(text_file),
        "data.context_size": 32,
        "data.held_out_fraction": 0.1,
        "stream.sequences_per_forward": 4,
        "harvest.folder": str(folder),
        "harvest.shard_tokens": 300,
        "harvest.tokens": 3000,
    }
    return from_flat({**flat, **{key.replace("__", "."): v for key, v in changed.items()}})


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quiet(_: object) -> None:
    """Tell nobody."""


def killed(work: Callable[[], None], arm: Callable[[], float | None]) -> bool:
    """Run `work` in a child; say whether signal 9 ended it.

    `arm` runs in the child first, and may return after how many seconds the child is killed.
    """
    child = os.fork()
    if child == 0:
        seconds = arm()
        if seconds is not None:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, seconds)
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def arm_write(number: int) -> Callable[[], None]:
    """Return what lets a process kill itself before its write number `number`."""

    def arm() -> None:
        honest, honest_text, done = os.write, Path.replace, []

        def count() -> None:
            done.append(1)
            if len(done) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def write(descriptor: int, data: bytes) -> int:
            count()
            return honest(descriptor, data)

        def replace(path: Path, target: Path) -> Path:
            count()
            return honest_text(path, target)

        os.write, Path.replace = write, replace  # pyright: ignore[reportAttributeAccessIssue]

    return arm


def main() -> None:
    """Harvest under fire until one harvest ends by itself."""
    torch.set_num_threads(1)
    cfg = from_flat(read_yaml(Path(sys.argv[1])))
    folder, chance = Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    opened = harvesting.open_model(cfg, torch.device("cpu"))
    harvesting.open_model = lambda *_, **__: opened
    start = time.monotonic()
    harvesting.harvest(from_flat({"harvest.folder": f"{folder}.first"}, cfg), say=quiet)
    seconds = time.monotonic() - start

    def work() -> None:
        harvesting.harvest(from_flat({"harvest.folder": str(folder)}, cfg), say=quiet)

    n_killed, left = 0, set()
    while True:
        event = chance.randint(1, 40)  # a shard takes some twenty
        arm = (
            arm_write(event) if chance.random() < 0.7 else (lambda: chance.uniform(0, seconds / 4))
        )
        if not killed(work, arm):
            break
        n_killed += 1
        left.add(len(Manifest.read(folder).shards) if (folder / MANIFEST).exists() else 0)
    sys.stdout.write(f"{n_killed} {len(left)}\n")


if __name__ == "__main__":
    main()
