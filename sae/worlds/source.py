"""Training on a world: its samples as an `ActivationSource`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
from torch import Tensor

from sae.stream.source import SourceState
from sae.worlds.seeds import calibration_generator
from sae.worlds.world import World

CALIBRATION_ROWS = 16_384


class WorldSource:
    """Fresh samples of a world for ever; an `ActivationSource`.

    As with text, rows come in lanes: lane i is the same whichever process draws it, and a batch
    takes equally many rows of every lane, so that a run goes on with the same batches on any number
    of processes that divides the lanes. All lanes move together: the place is one number.

    Args:
        lanes: this process's lanes, of n_lanes in all.
    """

    def __init__(
        self, world: World, *, seed: int = 0, lanes: Iterable[int] = (0,), n_lanes: int = 1
    ):
        self.world, self.seed, self.n_lanes = world, seed, n_lanes
        self.lanes = tuple(sorted(lanes))
        self.name, self.widths = f"the world {world.cfg.name}", (world.d_in,)
        self.taken = 0
        self._blocks: dict[int, tuple[int, Tensor]] = {}

    def warm_up(self, tell: Callable[[int, int], None]) -> None:
        """Do nothing: rows are made as they are needed."""

    def next_batch(self, n: int) -> Tensor:
        """Return the next n samples, (n, d_in), on the world's device.

        Errors: ValueError where n is no multiple of this process's lanes.
        """
        if n % len(self.lanes):
            raise ValueError(
                f"rows must be asked for in multiples of the {len(self.lanes)} lanes; got {n}. "
                "Set `train.batch_tokens` or `stream.lanes` so that they divide."
            )
        of_lane = n // len(self.lanes)
        parts = [part for lane in self.lanes for part in self._rows(lane, of_lane)]
        self.taken += of_lane
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def next_rows(self, n: int) -> tuple[Tensor, ...]:
        """Return `next_batch` as the rows of a single hookpoint."""
        return (self.next_batch(n),)

    def calibration_sample(self) -> Tensor:
        """Return 16,384 samples that training never draws, the same in every process."""
        generator = calibration_generator(self.seed, self.world.device)
        size = self.world.block_rows
        counts = [min(size, CALIBRATION_ROWS - start) for start in range(0, CALIBRATION_ROWS, size)]
        return torch.cat([self.world.activations(count, generator) for count in counts])

    def reserved_rows(self) -> Tensor:
        """Return rows that training never sees, to set the thresholds of what is saved."""
        return self.calibration_sample()

    def state(self) -> SourceState:
        """Return the rows taken of each lane, and of which world."""
        return SourceState({"taken": self.taken, "world": self._identity()})

    def load_state(self, state: SourceState) -> None:
        """Continue bit for bit from a saved place.

        Errors: ValueError where the place is in another world.
        """
        if state.position["world"] != self._identity():
            raise ValueError(
                "a run must be resumed in the world it began in; it began in "
                f"{state.position['world']}, now {self._identity()}."
            )
        self.taken = state.position["taken"]
        self._blocks.clear()

    def metadata(self) -> dict[str, object]:
        """Return which world a dictionary was trained in, with all its settings."""
        settings = {
            key: value for key, value in asdict(self.world.cfg).items() if value is not None
        }
        return {"world": settings}

    def log_values(self) -> dict[str, float]:
        """Return nothing: samples are independent, and there is no buffer."""
        return {}

    def close(self) -> None:
        """Do nothing."""

    def _identity(self) -> dict[str, object]:
        """Return what rows follow from, beside the place, as JSON gives it back."""
        size = {"seed": self.seed, "lanes": self.n_lanes, "block_rows": self.world.block_rows}
        settings = json.dumps(asdict(self.world.cfg), sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        kind = {"name": self.world.cfg.name, "settings": digest}
        return {**kind, **size, "device": self.world.device.type}

    def _rows(self, lane: int, n: int) -> list[Tensor]:
        """Return the lane's rows from `taken` on, in pieces of blocks."""
        size, parts, start = self.world.block_rows, [], self.taken
        end = start + n
        while start < end:
            number, first = divmod(start, size)
            last = min(size, first + end - start)
            parts.append(self._block(lane, number)[first:last])
            start += last - first
        return parts

    def _block(self, lane: int, number: int) -> Tensor:
        held = self._blocks.get(lane)
        if held is None or held[0] != number:
            drawn = self.world.training_block(self.seed, number, lane=lane, n_lanes=self.n_lanes)
            held = self._blocks[lane] = (number, drawn)
        return held[1]
