"""Rows of several groups, the same number of each, in bounded memory.

The one idea: of each group are kept the rows with the lowest numbers (`sae.evals.numbers`), a
uniform sample that is the same for any batches, order and processes.

Memory: groups · size · (d + 2 k + 2) · 4 bytes, whatever the number of rows seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.numbers import HIGHEST

NONE = HIGHEST + 1


class RowSample:
    """The `size` rows with the lowest numbers of each group, lowest first.

    Attributes:
        numbers: (g, size) int64, NONE where a group has fewer rows. tags: (g, size) int64, what
            was said of each row. counts: (g) int64, all rows that were in each group.
        x: (g, size, d) float32. values, indices: (g, size, k), its code.
    """

    def __init__(self, n_groups: int, size: int) -> None:
        self.size = size
        self.numbers = torch.full((n_groups, size), NONE)
        self.tags = torch.zeros(n_groups, size, dtype=torch.int64)
        self.counts = torch.zeros(n_groups, dtype=torch.int64)
        self.x = torch.zeros(n_groups, size, 0)
        self.values, self.indices = torch.zeros(n_groups, size, 0), self.tags[:, :, None][..., :0]

    def update(
        self,
        numbers: Tensor,
        is_in: Tensor,
        x: Tensor,
        latents: Latents,
        tags: Tensor | None = None,
    ) -> None:
        """Add n rows: numbers (n), is_in (n, g) bool, x (n, d), latents (n, k), tags (n)."""
        self.counts += is_in.sum(0).cpu()
        self._add(numbers, is_in, x, latents, tags)

    def merge(self, other: RowSample) -> None:
        """Add another's rows."""
        self.counts += other.counts
        has = other.numbers != NONE
        if has.any():
            group = has.nonzero()[:, 0]
            is_in = torch.nn.functional.one_hot(group, len(self.counts)).bool()
            latents = Latents(other.values[has], other.indices[has])
            self._add(other.numbers[has], is_in, other.x[has], latents, other.tags[has])

    @property
    def has(self) -> Tensor:
        """Which places hold a row, (g, size) bool."""
        return self.numbers != NONE

    def _add(
        self, numbers: Tensor, is_in: Tensor, x: Tensor, latents: Latents, tags: Tensor | None
    ) -> None:
        numbers, is_in = numbers.cpu(), is_in.cpu()
        offered = torch.where(is_in.T, numbers, NONE)
        both = torch.cat([self.numbers, offered], 1)
        kept, place = both.topk(self.size, 1, largest=False)
        is_new = (place >= self.size) & (kept != NONE)
        changed = is_new.any(1).nonzero()[:, 0]
        if not len(changed):
            return
        self.numbers = kept
        new = (is_new[changed], (place[changed] - self.size).clamp_min(0))
        old = place[changed].clamp_max(self.size - 1)
        width = max(self.values.shape[2], latents.values.shape[1])
        rows = {
            "x": x.float(),
            "values": padded(latents.values.float(), width),
            "indices": padded(latents.indices, width),
            "tags": torch.zeros_like(numbers) if tags is None else tags,
        }
        self.values, self.indices = padded(self.values, width), padded(self.indices, width)
        self.x = padded(self.x, x.shape[1])
        for name, given in rows.items():
            self._replace(name, given, changed, old, new)

    def _replace(
        self, name: str, given: Tensor, changed: Tensor, old: Tensor, new: tuple[Tensor, Tensor]
    ) -> None:
        """Put a group's rows in their new order, and given rows in where they are new."""
        whole = getattr(self, name)
        rows = whole[changed[:, None], old]
        is_new, place = new
        rows[is_new] = given[place[is_new].to(given.device)].to("cpu", rows.dtype)
        whole[changed] = rows


def padded(rows: Tensor, width: int) -> Tensor:
    """Return rows (…, k) with zeros behind, (…, width)."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[-1]))
