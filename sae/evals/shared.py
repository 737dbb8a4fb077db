"""What every result carries, whichever evals are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.evals.fingerprint import TokenDigest
from sae.evals.interface import EvalBatch, Seen
from sae.evals.ranks import Ranks


class Shared:
    """What every result carries: the tokens seen, their mean activation (d_in), their L0."""

    def __init__(self, d_in: int, has_text: bool = False) -> None:
        self.seen, self.digest = Seen(), TokenDigest(has_text)
        self._sum = torch.zeros(d_in, dtype=torch.float64)
        self._n_active = 0

    def update(self, batch: EvalBatch) -> None:
        """Add n tokens."""
        self.seen.update(batch.document_ids)
        self.digest.update(batch.document_ids, batch.tokens, batch.x)
        self._sum += batch.x.sum(0, dtype=torch.float64).cpu()
        self._n_active += int(batch.latents.l0().sum())

    @property
    def mean(self) -> Tensor:
        return self._sum / max(self.seen.n_tokens, 1)

    @property
    def l0(self) -> float:
        return self._n_active / max(self.seen.n_tokens, 1)

    def over(self, ranks: Ranks) -> Shared:
        """Return what all processes saw."""
        whole, *others = ranks.everywhere(self)
        for other in others:
            whole.seen.merge(other.seen)
            whole.digest.merge(other.digest)
            whole._sum += other._sum
            whole._n_active += other._n_active
        return whole

    def arrays(self) -> dict[str, Tensor]:
        """Return which documents were seen, where they have numbers of their own in a text."""
        return {"evaluated/document_ids": self.seen.documents} if self.digest.has_text else {}

    def require_tokens(self) -> None:
        """Refuse to compute from nothing."""
        if self.seen.n_tokens == 0:
            raise ValueError(
                "the contexts must hold tokens that are not masked; there were none. Give more "
                "text, or mask fewer tokens (`data.mask`, `data.exclude_tokens`, "
                "`data.max_norm_ratio`)."
            )
