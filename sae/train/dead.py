"""Which latents are dead: those that have not fired in the last `dead_after_tokens` tokens.

The counters live on the device and no step reads them. The list that AuxK trains is made anew
every few steps, between steps, so its length is known on the host and may be zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.latents import SparseCode
from sae.train.distributed import max_over_ranks

DEAD_LISTED_PER_K_AUX = 4
# A captured step knows one length of the list: it is filled up to a power of two.
SHORTEST_DEAD_LIST = 64


class DeadLatents:
    """Count tokens since each latent fired.

    Attributes:
        last_fired_at: (d_sae) int64, the number of tokens seen, over all processes, when each
            latent last fired. indices: (n_dead) int64, the list made by the last `refresh`.
            counts: (d_sae) float32, how often each fired in this process since they were last
            sorted by it; None where nothing sorts them.
    """

    def __init__(
        self,
        d_sae: int,
        *,
        dead_after_tokens: int,
        k_aux: int,
        device: torch.device,
        is_counting: bool = False,
    ):
        self.dead_after_tokens = dead_after_tokens
        self.max_listed = DEAD_LISTED_PER_K_AUX * k_aux
        self.last_fired_at = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.indices = torch.empty(0, dtype=torch.int64, device=device)
        self.counts = torch.zeros(d_sae, device=device) if is_counting else None

    def update(self, code: SparseCode | Tensor, tokens_seen: int | Tensor) -> None:
        """Note which latents fired in a batch, after which `tokens_seen` tokens were seen.

        The number may be a scalar on the device: a captured step replays the read of it.
        """
        counts = firings(code, len(self.last_fired_at))
        # Not masked_fill_, which on a GPU waits for the number.
        self.last_fired_at.copy_(torch.where(counts > 0, tokens_seen, self.last_fired_at))
        if self.counts is not None:
            self.counts.add_(counts)

    def refresh(self, tokens_seen: int) -> None:
        """Make the list anew: the longest dead first, at most 4 k_aux of them."""
        max_over_ranks(self.last_fired_at)
        is_dead = self._is_dead(tokens_seen)
        dead = is_dead.nonzero().squeeze(1)
        longest = torch.argsort(self.last_fired_at[dead], stable=True)[: self.max_listed]
        self.indices = dead[longest].sort().values

    def share(self, tokens_seen: int) -> Tensor:
        """Return the share of latents that are dead, a scalar on the device.

        All processes call this together.
        """
        max_over_ranks(self.last_fired_at)
        return self._is_dead(tokens_seen).double().mean()

    def _is_dead(self, tokens_seen: int) -> Tensor:
        return tokens_seen - self.last_fired_at >= self.dead_after_tokens


class DeadList:
    """The list of dead latents that a step trains, in a few lengths: a graph is made for each."""

    def __init__(self, dead: DeadLatents, *, is_padded: bool):
        self.dead, self.is_padded = dead, is_padded
        self._made_from, self._padded = None, dead.indices

    def indices(self) -> Tensor:
        """Return the list, filled up with d_sae; the same tensor until the list is made anew."""
        listed = self.dead.indices
        if listed is not self._made_from:
            self._made_from, n_rows = listed, listed.numel()
            if self.is_padded and n_rows:
                n_rows = max(SHORTEST_DEAD_LIST, 1 << (n_rows - 1).bit_length())
            self._padded = listed.new_full((n_rows,), len(self.dead.last_fired_at))
            self._padded[: listed.numel()] = listed
        return self._padded


def firings(code: SparseCode | Tensor, d_sae: int) -> Tensor:
    """Return in how many pairs of a batch each latent fired, (d_sae), without a host sync."""
    if isinstance(code, Tensor):
        return (code.detach() != 0).sum(0, dtype=torch.float32)
    counts = torch.zeros(d_sae, device=code.values.device)
    is_active = (code.values.detach() != 0).float().flatten()
    return counts.scatter_add_(0, code.indices.flatten(), is_active)
