"""The rows of a harvest as one matrix on disk, for `sae.fit`: only what is asked for is in memory.

Any row can be had at any time, so that an epoch is a permutation of all rows; what the rows cost in
time is up to the disk. Training from a configuration (`stream.shards`) reads shards in sequence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae.stream.manifest import read_complete
from sae.stream.shard_files import ShardFile


class HarvestedRows:
    """The (n, d) rows of a harvest of one hookpoint, memory-mapped; indexed as a tensor is.

    Every row is read and checked once when it is opened.
    Errors: ValueError where the harvest is not complete or has several hookpoints;
    DamagedShardError where a shard is not what was written.
    """

    ndim, is_cuda, device = 2, False, torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        manifest = read_complete(folder)
        name, *others = manifest.names
        if others:
            raise ValueError(
                f"`{folder}` must hold one hookpoint to be fitted; it holds "
                f"{', '.join(manifest.names)}. Name one in `model.hookpoint` of a configuration, "
                f"and train it with `--stream.shards {folder}`."
            )
        self.dtype = manifest.dtype
        self.shape: tuple[int, int] = (manifest.rows, manifest.widths[0])
        files = [ShardFile(folder, entry) for entry in manifest.shards]
        name = next(iter(manifest.names))
        for file in files:
            for piece in range(file.entry.pieces):
                file.rows(piece, name)
        self._ends = torch.tensor([entry.rows for entry in manifest.shards]).cumsum(0)
        self._parts = [_mapped(file, name) for file in files]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return the rows of a slice or of (m) int64 numbers, (m, d), in memory."""
        numbers = torch.arange(len(self))[index]
        out = torch.empty(len(numbers), self.shape[1], dtype=self.dtype)
        shards = torch.bucketize(numbers, self._ends, right=True)
        for shard in shards.unique().tolist():
            here = (shards == shard).nonzero().squeeze(1)
            part = self._parts[shard]
            out[here] = part[numbers[here] - (int(self._ends[shard]) - len(part))]
        return out

    def is_floating_point(self) -> bool:
        """Say True, as a tensor of activations does."""
        return True

    def detach(self) -> HarvestedRows:
        """Return itself: there is no graph."""
        return self


def _mapped(file: ShardFile, name: str) -> Tensor:
    place = file.place(name)
    n_bytes = place.shape[0] * place.shape[1] * place.dtype.itemsize
    # Copy-on-write: torch wants writable memory, and nothing here writes.
    data = np.memmap(file.path, dtype=np.uint8, mode="c", offset=place.offset, shape=(n_bytes,))
    return torch.from_numpy(data).view(place.dtype).view(place.shape)
