"""What every latent does on a stream of contexts, collected for all latents in one pass.

The one idea: a batch's sparse code is a list of (latent, token, value) triples. Sorted by latent it
gives, without a dense (tokens, d_sae) matrix, each latent's strongest token in each sequence; those
are merged with a running top-m. Counts, histogram and top-m of two passes merge exactly, so the
result is the same for any batch size and any number of processes (the sorting is in `strongest`).

Memory: d_sae · (m · (8 · window + 20) + 8 · HISTOGRAM_BINS + 8) bytes beside one batch, where m is
`contexts_per_latent`; 65,536 latents with 8 contexts of 33 tokens take 0.2 GB whatever the number
of tokens. What a latent writes is in `logit_effects` and `neighbours`; files are in `atlas`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sae.analysis.strongest import (
    NO_TOKEN,
    Firings,
    Peaks,
    Top,
    distinct_peaks,
    list_firings,
    rank_in_run,
    sequence_peaks,
    strongest,
    windows,
)
from sae.coder.latents import Latents
from sae.stream.contexts import CapturedContexts
from sae.stream.masks import PADDING_DOCUMENT

HISTOGRAM_BINS = 128
BINS_PER_OCTAVE = 4
LOWEST_OCTAVE = -12


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
    sequences, have different texts before the peak (see `strongest`), and show `left` tokens before
    it and `right` after it. Reading stops after the batch that reaches `max_tokens`.
    """
    collector = FeatureCollector(
        coder.d_sae, contexts_per_latent=contexts_per_latent, left=left, right=right
    )
    for batch in contexts:
        collector.update(coder, batch)
        if max_tokens is not None and collector.n_tokens >= max_tokens:
            break
    return collector.features()


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
        self._left = left
        self._counts = torch.zeros(d_sae, dtype=torch.int64)
        self._histogram = torch.zeros(d_sae, HISTOGRAM_BINS, dtype=torch.int64)
        self._top = Top.empty(d_sae, contexts_per_latent, left + right + 1)

    @torch.no_grad()
    def update(self, coder: Encodes, batch: CapturedContexts) -> None:
        """Add a batch of contexts."""
        self._to(batch.activations.device)
        kept = batch.is_kept.flatten().to(batch.activations.device).nonzero().squeeze(1)
        if len(kept):
            code = coder.encode_sparse(batch.activations.flatten(0, 1)[kept].float())
            firings = list_firings(code, kept, batch.is_kept.numel())
            if len(firings.keys):
                self._count(firings)
                is_padding = batch.document_ids == PADDING_DOCUMENT
                shown = batch.tokens.masked_fill(is_padding, NO_TOKEN)
                self._add_contexts(firings, shown.to(kept.device))
        self.n_tokens += len(kept)
        self.n_sequences += len(batch.tokens)

    def merge(self, other: FeatureCollector) -> None:
        """Add what `other` collected on other sequences."""
        device = self._counts.device
        self._counts += other._counts.to(device)
        self._histogram += other._histogram.to(device)
        theirs = other._top.to(device)
        ids = theirs.sequence_ids
        shifted = torch.where(ids < 0, ids, ids + self.n_sequences)
        self._top = strongest(self._top, theirs._replace(sequence_ids=shifted))
        self.n_tokens += other.n_tokens
        self.n_sequences += other.n_sequences

    def features(self) -> Features:
        """Return the result so far, on the CPU."""
        top = self._top
        parts = (self._counts, self._histogram)
        parts += (top.peaks, top.sequence_ids, top.tokens, top.activations)
        return Features(self.n_tokens, self.n_sequences, self._left, *(p.cpu() for p in parts))

    def _to(self, device: torch.device) -> None:
        if self._counts.device != device:
            self._counts, self._histogram = self._counts.to(device), self._histogram.to(device)
            self._offsets = self._offsets.to(device)
            self._top = self._top.to(device)

    def _count(self, firings: Firings) -> None:
        ones = torch.ones_like(firings.latents)
        self._counts.index_add_(0, firings.latents, ones)
        octaves = firings.values.abs().log2() - LOWEST_OCTAVE
        bins = (octaves * BINS_PER_OCTAVE).floor().long().clamp_(0, HISTOGRAM_BINS - 1)
        flat = firings.latents * HISTOGRAM_BINS + bins
        self._histogram.view(-1).index_add_(0, flat, ones)

    def _add_contexts(self, firings: Firings, tokens: Tensor) -> None:
        """Merge the batch's strongest sequences of each latent into the running top-m."""
        m = self._top.peaks.shape[1]
        peaks = distinct_peaks(sequence_peaks(firings, tokens.shape), tokens, m)
        touched, row = peaks.latents.unique_consecutive(return_inverse=True)
        column = rank_in_run(peaks.latents)
        old = Top(*(part[touched] for part in self._top))
        # Most peaks of a late batch are weaker than what is kept: their windows are never built.
        is_in = peaks.values > old.peaks[row, -1]
        place, peaks = (row[is_in], column[is_in]), Peaks(*(part[is_in] for part in peaks))
        new = Top.empty(len(touched), m, len(self._offsets)).to(tokens.device)
        new.peaks[place] = peaks.values
        new.keys[place] = peaks.keys
        new.sequence_ids[place] = self.n_sequences + peaks.positions // tokens.shape[1]
        new.tokens[place], new.activations[place] = windows(firings, peaks, tokens, self._offsets)
        for kept, best in zip(self._top, strongest(old, new), strict=True):
            kept[touched] = best
