"""Whether parents are still found where their children fire: absorption, counted."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.evals.interface import Undefined, Value

DETECTED = 0.7
COUNTS = ("on", "on_found", "off", "off_found")
NO_PAIRS = "the world has no parents and children, or none that fired both with and without"


class Families:
    """Count, for pairs (p, 2) of parent and child features, how often the parent is found.

    A parent is found where the latent nearest to it, `latent_of` (n_features), fires. "On" are rows
    with parent and child, "off" rows with the parent and none of the children that `pairs` gives
    it.

    Source: Chanin et al. 2024, "A is for absorption" (arXiv 2409.14507), for what is looked for.
    """

    def __init__(self, pairs: Tensor, latent_of: Tensor) -> None:
        self.parents, self.children = pairs.cpu().unbind(1)
        self.latents = latent_of[self.parents]
        self.counts = torch.zeros(len(COUNTS), len(pairs), dtype=torch.int64)

    def update(self, fires: Tensor, is_true: Tensor) -> None:
        """Add rows: fires (n, d_sae) and is_true (n, n_features), bool, on the CPU."""
        if not len(self.parents):
            return
        child = is_true[:, self.children]
        brood = torch.zeros(is_true.shape, dtype=torch.int32)
        brood.index_add_(1, self.parents, child.int())
        parent, found = is_true[:, self.parents], fires[:, self.latents]
        on, off = parent & child, parent & (brood[:, self.parents] == 0)
        self.counts += torch.stack([mask.sum(0) for mask in (on, on & found, off, off & found)])

    def merge(self, other: Families) -> None:
        """Add another's rows."""
        self.counts += other.counts

    def compute(self) -> dict[str, Value]:
        """Return parent_recall_child_on, parent_recall_child_off and pairs_detected."""
        on, on_found, off, off_found = self.counts.double()
        has_both = (on > 0) & (off > 0)
        names = ("parent_recall_child_on", "parent_recall_child_off", "pairs_detected")
        if not has_both.any():
            return dict.fromkeys(names, Undefined(NO_PAIRS))
        recall_off = off_found[has_both] / off[has_both]
        recall_on = on_found[has_both] / on[has_both]
        detected = recall_off >= DETECTED
        reason = f"no parent is found in {DETECTED:.0%} of the rows without its children"
        return {
            names[0]: float(recall_on[detected].mean()) if detected.any() else Undefined(reason),
            names[1]: float(recall_off.mean()),
            names[2]: float(detected.double().mean()),
        }
