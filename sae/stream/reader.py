"""Reading hookpoints of one model, or of two that read the same tokens, in one forward each.

The hookpoints of a second model are called `other/PATH`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.stream.hookpoints import Hookpoint, capture

if TYPE_CHECKING:
    from sae.stream.language_model import LanguageModel

OTHER = "other/"


class Reader:
    """Activations of all hookpoints, in their order, those of the second model last.

    Args:
        lm: a model. hookpoints: where it is read; at least one. other: a model with the same
            tokenizer, read at the same hookpoints or at `other_hookpoints`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hookpoints: Sequence[Hookpoint],
        other: LanguageModel | None = None,
        other_hookpoints: Sequence[Hookpoint] = (),
    ):
        self.sites = [(lm, tuple(hookpoints))]
        if other is not None:
            self.sites.append((other, tuple(other_hookpoints or hookpoints)))
        prefixes = ("", OTHER)
        self.names = tuple(
            f"{prefix}{hookpoint}"
            for prefix, (_, found) in zip(prefixes, self.sites, strict=False)
            for hookpoint in found
        )
        shapes = [(a.shape[-1], a.dtype) for a in self.read(torch.zeros(1, 2, dtype=torch.int64))]
        self.widths, self.dtypes = (tuple(part) for part in zip(*shapes, strict=True))

    def read(self, tokens: Tensor) -> list[Tensor]:
        """Return each hookpoint's activations, (b, t, d), for tokens (b, t), in the model's dtype.

        A forward ends behind the deepest hookpoint.
        """
        found = []
        for lm, hookpoints in self.sites:
            captured = capture(lm.module, hookpoints, tokens)
            found += [captured[hookpoint] for hookpoint in hookpoints]
        return found
