"""What a coder is trained on: anything that hands out batches of rows and knows its place.

The trainer sees this interface only; `live` gives it a language model, `arrays` tensors, files and
iterators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class SourceState:
    """Where a source stands: `position` is plain JSON, `tensors` what cannot be made again.

    What differs between processes stands under `position["lanes"]`, by number, and in tensors whose
    names begin with the lane's; all else is the same on each of them.
    """

    position: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class ActivationSource(Protocol):
    """Endless batches of activations in raw units, in an order fixed by the seed."""

    name: str
    """Where the activations come from, for messages and metadata."""

    widths: tuple[int, ...]
    """The widths of the places in a row (`coder.sites`)."""

    def warm_up(self, tell: Callable[[int, int], None]) -> None:
        """Do what the first batch needs and takes long, telling (rows ready, rows needed)."""
        ...

    def next_batch(self, n: int) -> Tensor:
        """Return the next n rows: a token's activations at all places, (n, Σ widths)."""
        ...

    def next_rows(self, n: int) -> tuple[Tensor, ...]:
        """Return the next n rows of every hookpoint, (n, width) each."""
        ...

    def calibration_sample(self) -> Tensor:
        """Return rows, (m, Σ widths), without moving the source."""
        ...

    def state(self) -> SourceState:
        """Return what `load_state` needs to continue bit for bit."""
        ...

    def load_state(self, state: SourceState) -> None:
        """Continue from a saved place."""
        ...

    def metadata(self) -> dict[str, object]:
        """Return what a dictionary should remember of its origin (model_name, hook_name, …)."""
        ...

    def log_values(self) -> dict[str, float]:
        """Return what the log should say of the source since the last call."""
        ...

    def close(self) -> None:
        """Let go of threads and files."""
        ...


def require_finite(x: Tensor, name: str, where: str) -> None:
    """Stop at activations that hold NaN or infinity, naming the hookpoint.

    Errors: NonFiniteActivationsError.
    """
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).any(-1).sum())
        raise NonFiniteActivationsError(
            f"activations of `{name}` must be finite; {bad} of {x.shape[0]} tokens {where} hold "
            "NaN or infinity. Check the model's weights and dtype (float16 overflows: use "
            "`model.dtype: bfloat16` or float32), or the data given."
        )


class NonFiniteActivationsError(ValueError):
    """The source produced NaN or infinity."""
