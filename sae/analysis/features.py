"""What every latent does on a stream of contexts, collected for all latents in one pass.

The one idea: a batch's sparse code is a list of (latent, token, value) triples. Sorted by latent it
gives, without a dense (tokens, d_sae) matrix, each latent's strongest token in each sequence; those
are merged with a running top-m. Counts, histogram and top-m of two passes merge exactly, so the
result is the same for any batch size and any number of processes.

Memory: d_sae · (m · (8 · window + 12) + 8 · HISTOGRAM_BINS + 8) bytes beside one batch, where m is
`contexts_per_latent`; 65,536 latents with 8 contexts of 33 tokens take 0.2 GB whatever the number
of tokens. What a latent writes is in `logit_effects` and `neighbours`; files are in `atlas`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.stream.contexts import CapturedContexts

HISTOGRAM_BINS = 128
BINS_PER_OCTAVE = 4
LOWEST_OCTAVE = -12
NO_TOKEN = -1


class Encodes(Protocol):
    """Anything with a number of latents and a sparse code."""

    @property
    def d_sae(self) -> int: ...

    def encode_sparse(self, x: Tensor, /) -> Latents: ...


@dataclass(frozen=True)
class Features:
    """What a pass over `n_tokens` tokens of `n_sequences` contexts found.

    Shapes: firing_counts (d_sae) tokens; histogram (d_sae, HISTOGRAM_BINS) tokens by |activation|,
    edges in `histogram_edges`; peaks (d_sae, m) descending, −inf where fewer contexts exist;
    sequence_ids (d_sae, m), −1 there; tokens (d_sae, m, window) int32, NO_TOKEN outside the
    sequence; activations (d_sae, m, window). The peak stands at window position `left`.
    """

    n_tokens: int
    n_sequences: int
    left: int
    firing_counts: Tensor
    histogram: Tensor
    peaks: Tensor
    sequence_ids: Tensor
    tokens: Tensor
    activations: Tensor

    @property
    def d_sae(self) -> int:
        return len(self.firing_counts)

    @property
    def firing_rates(self) -> Tensor:
        """Share of tokens on which each latent fires, (d_sae) float64."""
        return self.firing_counts.double() / max(self.n_tokens, 1)

    @property
    def max_activations(self) -> Tensor:
        """Each latent's largest activation, (d_sae); 0 where it never fired."""
        return self.peaks[:, 0].where(self.firing_counts > 0, 0.0)

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a token."""
        return float(self.firing_counts.sum()) / max(self.n_tokens, 1)


def histogram_edges() -> Tensor:
    """Return the HISTOGRAM_BINS + 1 edges, in activation units; the outer bins are open."""
    steps = torch.arange(HISTOGRAM_BINS + 1, dtype=torch.float64)
    return torch.exp2(LOWEST_OCTAVE + steps / BINS_PER_OCTAVE)


def collect_features(
    coder: Encodes,
    contexts: Iterable[CapturedContexts],
    *,
    contexts_per_latent: int = 8,
    left: int = 20,
    right: int = 12,
    max_tokens: int | None = None,
) -> Features:
    """Read `contexts` once and return what every latent does on them.

    Only tokens with `is_kept` are encoded and counted. A latent's contexts come from different
    sequences and show `left` tokens before the peak and `right` after it. Reading stops after the
    batch that reaches `max_tokens`.
    """
    collector = FeatureCollector(
        coder.d_sae, contexts_per_latent=contexts_per_latent, left=left, right=right
    )
    for batch in contexts:
        collector.update(coder, batch)
        if max_tokens is not None and collector.n_tokens >= max_tokens:
            break
    return collector.features()


class _Firings(NamedTuple):
    """A batch's non-zero code, sorted by `keys` = latent · (b · t) + token; (p) each."""

    keys: Tensor
    latents: Tensor
    tokens: Tensor
    values: Tensor


class _Top(NamedTuple):
    """Strongest contexts of some latents; see `Features` for the shapes."""

    peaks: Tensor
    sequence_ids: Tensor
    tokens: Tensor
    activations: Tensor


class FeatureCollector:
    """The running state of one pass: counts, histogram and the strongest contexts."""

    def __init__(
        self, d_sae: int, *, contexts_per_latent: int = 8, left: int = 20, right: int = 12
    ):
        if contexts_per_latent < 1 or left < 0 or right < 0:
            raise ValueError(
                "`contexts_per_latent` must be at least 1 and `left`, `right` at least 0; got "
                f"{contexts_per_latent}, {left}, {right}."
            )
        self.n_tokens = self.n_sequences = 0
        self._offsets = torch.arange(-left, right + 1)
        self._left, shape = left, (d_sae, contexts_per_latent)
        self._counts = torch.zeros(d_sae, dtype=torch.int64)
        self._histogram = torch.zeros(d_sae, HISTOGRAM_BINS, dtype=torch.int64)
        self._top = _Top(
            torch.full(shape, -torch.inf),
            torch.full(shape, -1, dtype=torch.int64),
            torch.full((*shape, left + right + 1), NO_TOKEN, dtype=torch.int32),
            torch.zeros(*shape, left + right + 1),
        )

    @torch.no_grad()
    def update(self, coder: Encodes, batch: CapturedContexts) -> None:
        """Add a batch of contexts."""
        self._to(batch.activations.device)
        kept = batch.is_kept.flatten().to(batch.activations.device).nonzero().squeeze(1)
        if len(kept):
            code = coder.encode_sparse(batch.activations.flatten(0, 1)[kept].float())
            firings = _firings(code, kept, batch.is_kept.numel())
            if len(firings.keys):
                self._count(firings)
                self._add_contexts(firings, batch.tokens.to(kept.device))
        self.n_tokens += len(kept)
        self.n_sequences += len(batch.tokens)

    def merge(self, other: FeatureCollector) -> None:
        """Add what `other` collected on other sequences."""
        device = self._counts.device
        self._counts += other._counts.to(device)
        self._histogram += other._histogram.to(device)
        theirs = _Top(*(part.to(device) for part in other._top))
        ids = theirs.sequence_ids
        shifted = torch.where(ids < 0, ids, ids + self.n_sequences)
        self._top = _strongest(self._top, theirs._replace(sequence_ids=shifted))
        self.n_tokens += other.n_tokens
        self.n_sequences += other.n_sequences

    def features(self) -> Features:
        """Return the result so far, on the CPU."""
        parts = (self._counts, self._histogram, *self._top)
        return Features(self.n_tokens, self.n_sequences, self._left, *(p.cpu() for p in parts))

    def _to(self, device: torch.device) -> None:
        if self._counts.device != device:
            self._counts, self._histogram = self._counts.to(device), self._histogram.to(device)
            self._offsets = self._offsets.to(device)
            self._top = _Top(*(part.to(device) for part in self._top))

    def _count(self, firings: _Firings) -> None:
        ones = torch.ones_like(firings.latents)
        self._counts.index_add_(0, firings.latents, ones)
        octaves = firings.values.abs().log2() - LOWEST_OCTAVE
        bins = (octaves * BINS_PER_OCTAVE).floor().long().clamp_(0, HISTOGRAM_BINS - 1)
        flat = firings.latents * HISTOGRAM_BINS + bins
        self._histogram.view(-1).index_add_(0, flat, ones)

    def _add_contexts(self, firings: _Firings, tokens: Tensor) -> None:
        """Merge the batch's strongest sequences of each latent into the running top-m."""
        m = self._top.peaks.shape[1]
        latents, positions, values = _peaks_of_sequences(firings, tokens.shape, m)
        touched, row = latents.unique_consecutive(return_inverse=True)
        column = _rank_in_run(latents)
        old = _Top(*(part[touched] for part in self._top))
        # Most peaks of a late batch are weaker than what is kept: their windows are never built.
        is_in = values > old.peaks[row, -1]
        row, column = row[is_in], column[is_in]
        new = _empty_like(old)
        new.peaks[row, column] = values[is_in]
        new.sequence_ids[row, column] = self.n_sequences + positions[is_in] // tokens.shape[1]
        shown, activations = self._windows(firings, latents[is_in], positions[is_in], tokens)
        new.tokens[row, column] = shown
        new.activations[row, column] = activations
        for kept, best in zip(self._top, _strongest(old, new), strict=True):
            kept[touched] = best

    def _windows(
        self, firings: _Firings, latents: Tensor, positions: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return tokens and activations (p, window) around flat `positions` (p)."""
        n_sequence = tokens.shape[1]
        place = (positions % n_sequence)[:, None] + self._offsets
        is_inside = (place >= 0) & (place < n_sequence)
        flat = (positions[:, None] + self._offsets).clamp(0, tokens.numel() - 1)
        wanted = latents[:, None] * tokens.numel() + flat
        slot = torch.searchsorted(firings.keys, wanted).clamp_(max=len(firings.keys) - 1)
        is_active = is_inside & (firings.keys[slot] == wanted)
        shown = tokens.flatten()[flat].where(is_inside, NO_TOKEN).int()
        return shown, firings.values[slot].where(is_active, 0.0)


def _firings(code: Latents, kept: Tensor, n_positions: int) -> _Firings:
    """List the active slots of `code` (n, k), whose tokens lie at flat positions `kept` (n)."""
    row, slot = (code.values != 0).nonzero(as_tuple=True)
    latents, tokens = code.indices[row, slot], kept[row]
    keys, order = (latents * n_positions + tokens).sort()
    values = code.values[row, slot].float()
    return _Firings(keys, latents[order], tokens[order], values[order])


def _peaks_of_sequences(
    firings: _Firings, shape: torch.Size, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (latents, positions, values) of each latent's strongest token in its m best sequences.

    Sorted by latent, then by descending value; of equal values the earlier token comes first.
    """
    order = torch.sort(firings.values, descending=True, stable=True).indices
    order = order[torch.sort(firings.latents[order], stable=True).indices]
    latents, positions = firings.latents[order], firings.tokens[order]
    groups = latents * shape[0] + positions // shape[1]
    by_group, where = torch.sort(groups, stable=True)
    is_peak = torch.zeros_like(groups, dtype=torch.bool)
    is_peak[where[_starts_run(by_group)]] = True
    order, latents, positions = order[is_peak], latents[is_peak], positions[is_peak]
    is_best = _rank_in_run(latents) < m
    return latents[is_best], positions[is_best], firings.values[order][is_best]


def _starts_run(sorted_ids: Tensor) -> Tensor:
    """Mark the first element of each run of equal ids, (p) bool."""
    is_start = torch.ones_like(sorted_ids, dtype=torch.bool)
    is_start[1:] = sorted_ids[1:] != sorted_ids[:-1]
    return is_start


def _rank_in_run(sorted_ids: Tensor) -> Tensor:
    """Return each element's place in its run of equal ids, counted from 0, (p)."""
    place = torch.arange(len(sorted_ids), device=sorted_ids.device)
    return place - torch.cummax(place.where(_starts_run(sorted_ids), 0), 0).values


def _empty_like(top: _Top) -> _Top:
    return _Top(
        torch.full_like(top.peaks, -torch.inf),
        torch.full_like(top.sequence_ids, -1),
        torch.full_like(top.tokens, NO_TOKEN),
        torch.zeros_like(top.activations),
    )


def _strongest(first: _Top, second: _Top) -> _Top:
    """Return the m strongest contexts of both, latent by latent; ties keep `first`'s before."""
    both = _Top(*(torch.cat(pair, 1) for pair in zip(first, second, strict=True)))
    order = torch.sort(both.peaks, dim=1, descending=True, stable=True).indices
    order = order[:, : first.peaks.shape[1]]
    wide = order[:, :, None].expand(-1, -1, both.tokens.shape[2])
    return _Top(
        both.peaks.gather(1, order),
        both.sequence_ids.gather(1, order),
        both.tokens.gather(1, wide),
        both.activations.gather(1, wide),
    )
