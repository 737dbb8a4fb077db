"""The law of a world written densely, in float64: every feature of every row gets its numbers.

Slow and plain, to be read beside the definition; the library's draws are compared to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.worlds import World


def dense_codes(world: World, n: int, seed: int) -> Tensor:
    """Return codes (n, n_features) of n samples."""
    law, forest = world.firing.features, world.firing.forest
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n_features, rank = law.loading.shape
    drive = normal(n, rank) @ law.loading.double().T + normal(n, n_features)
    strength = (law.mean.double() + law.sd.double() * normal(n, n_features)).relu()
    codes = torch.where(drive > law.threshold.double(), strength, 0.0)
    # Features are numbered breadth first, so that parents are settled before their children.
    for parent in range(n_features):
        children = forest.children[parent]
        children = children[children >= 0]
        if len(children) == 0:
            continue
        if forest.is_exclusive[parent]:
            lot = torch.rand(n, len(children), generator=generator)
            winner = torch.where(codes[:, children] > 0, lot, -1.0).argmax(1, keepdim=True)
            keep = torch.zeros(n, len(children), dtype=torch.bool).scatter_(1, winner, True)
            codes[:, children] *= keep
        of_parent = codes[:, [parent]] / law.mean[parent].double()
        if not world.firing.scaled_by_parent:
            of_parent = (of_parent > 0).double()
        codes[:, children] *= of_parent
    return codes * law.norm.double()
