"""What changes where masked tokens count too: BOS, first positions, special tokens, outliers.

The other evals leave out the tokens that training left out (`data.mask`, `data.exclude_tokens`, and
those beyond `max_norm`). With all tokens of documents, padding alone left out:
    unmasked_fvu, unmasked_cosine, unmasked_l0 = as fvu, cosine and l0
    masked = share of the tokens that the others leave out
    masked_norm = their mean ‖x‖ over that of the rest
    mask_matters = largest relative difference of fvu, cosine and l0 that masking makes; above 1%
        both numbers should be told, and which of them a comparison uses
A BOS token often has 200 times the norm of others: where it counts, fvu is about it alone.
Source: Sun et al. 2024, "Massive activations in large language models" (the outliers).

Cost: the dictionary once more on every token; O(n d_in). Memory: twice that of `reconstruction`.
Cannot see: what `reconstruction` cannot; which kind of masked token made a difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.interface import ContextBatch, EvalBatch, EvalSetup, Label, Seen, Undefined, Value
from sae.evals.reconstruction import Reconstruction
from sae.stream.masks import PADDING_DOCUMENT

NO_TOKEN = "no token was evaluated"
NONE_MASKED = "no token is masked"

LABELS = {
    "unmasked_fvu": Label("fraction of variance unexplained, masked tokens included"),
    "unmasked_cosine": Label("cosine of x and x_hat, masked tokens included"),
    "unmasked_l0": Label("L0, masked tokens included"),
    "masked": Label("tokens that are masked elsewhere", "share"),
    "masked_norm": Label("their norm over that of the others"),
    "mask_matters": Label("largest change of the three by masking", "share"),
}


class _Side:
    """Reconstruction, firing latents and norms of some of the tokens."""

    def __init__(self, setup: EvalSetup) -> None:
        self.reconstruction = Reconstruction(setup)
        self.n_active, self.norm = 0, 0.0

    def update(self, batch: EvalBatch) -> None:
        self.reconstruction.update(batch)
        self.n_active += int(batch.latents.l0().sum())
        self.norm += float(batch.x.double().norm(dim=1).sum())

    def merge(self, other: _Side) -> None:
        self.reconstruction.merge(other.reconstruction)
        self.n_active += other.n_active
        self.norm += other.norm

    @property
    def n_tokens(self) -> int:
        return self.reconstruction.seen.n_tokens

    def values(self) -> dict[str, Value]:
        """Return fvu and cosine with their intervals, and l0."""
        found = self.reconstruction.compute()
        kept = {k: v for k, v in found.items() if k.split("/")[0] in ("fvu", "cosine")}
        return {**kept, "l0": self.n_active / max(self.n_tokens, 1)}


class Masking:
    """Accumulates all tokens, and those that are not masked.

    Errors: ValueError for a setup without a coder.
    """

    def __init__(self, setup: EvalSetup) -> None:
        if setup.coder is None:
            raise ValueError(
                "masking must be given the coder; this setup has none. Use `evaluate`."
            )
        self.setup, self.coder, self.seen = setup, setup.coder, Seen()
        self.all, self.kept = _Side(setup), _Side(setup)

    def update(self, batch: ContextBatch) -> None:
        """Encode every token of the batch but padding."""
        contexts = batch.contexts
        x = contexts.activations.flatten(0, 1)
        ids = contexts.document_ids.flatten().to(x.device)
        is_kept = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        is_kept[batch.kept.to(x.device)] = True
        counted = ((ids != PADDING_DOCUMENT) | is_kept).nonzero()[:, 0]
        for rows in self.coder.chunks(len(counted)):
            at = counted[rows]
            self._add(x[at], ids[at], is_kept[at])

    def merge(self, other: Masking) -> None:
        """Add another's tokens."""
        self.seen.merge(other.seen)
        self.all.merge(other.all)
        self.kept.merge(other.kept)

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module; intervals for fvu and cosine."""
        n, n_kept = self.all.n_tokens, self.kept.n_tokens
        if n == 0:
            return dict.fromkeys(LABELS, Undefined(NO_TOKEN))
        values = self.all.values()
        return {
            **{f"unmasked_{name}": value for name, value in values.items()},
            "masked": (n - n_kept) / n,
            "masked_norm": self._norm_of_masked(n, n_kept),
            "mask_matters": _largest_change(self.kept.values(), values),
        }

    def arrays(self) -> dict[str, Tensor]:
        """Return nothing: all of this module's results are numbers."""
        return {}

    def _add(self, x: Tensor, ids: Tensor, is_kept: Tensor) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        latents, x_hat = self.coder.encode_decode(x)
        whole = EvalBatch(self.coder.written(x), x_hat, latents, torch.zeros_like(ids), ids)
        self.seen.update(ids)
        self.all.update(whole)
        code = Latents(*(part[is_kept] for part in latents))
        tokens = whole.tokens[is_kept]
        self.kept.update(EvalBatch(whole.x[is_kept], x_hat[is_kept], code, tokens, ids[is_kept]))

    def _norm_of_masked(self, n: int, n_kept: int) -> Value:
        if n == n_kept:
            return Undefined(NONE_MASKED)
        if n_kept == 0 or self.kept.norm == 0:
            return Undefined("every token is masked, or the others are 0")
        masked = (self.all.norm - self.kept.norm) / (n - n_kept)
        return masked / (self.kept.norm / n_kept)


def _largest_change(masked: dict[str, Value], unmasked: dict[str, Value]) -> Value:
    """Return max |unmasked − masked| / |masked| over the three."""
    changes = []
    for name in ("fvu", "cosine", "l0"):
        one, other = masked.get(name), unmasked.get(name)
        if isinstance(one, float | int) and isinstance(other, float | int) and one:
            changes.append(abs(other - one) / abs(one))
    return max(changes) if changes else Undefined("none of the three has a value")
