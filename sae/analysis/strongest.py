"""Strongest contexts of many latents at once, from sparse codes: list, group, merge.

A batch's code is a list of `Firings`; `sequence_peaks` finds each latent's strongest token in each
sequence, `distinct_peaks` the m best with different texts, `windows` what surrounds them, and
`strongest` merges two `Top`s. All are sorts and gathers over what fired, never a dense matrix.

Two peaks show the same text when the KEY_TOKENS tokens up to the peak agree: activations do not
depend on what comes after. Of equal texts the strongest is kept, so merging stays exact for any
split of the sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.coder.latents import Latents

NO_TOKEN = -1
KEY_TOKENS = 8
# An odd multiplier with well-mixed bits (Knuth's MMIX generator); int64 arithmetic wraps round.
HASH_FACTOR = 6364136223846793005


class Firings(NamedTuple):
    """The non-zero part of a batch's code, sorted by `keys` = latent · (b · t) + token; all (p)."""

    keys: Tensor
    latents: Tensor
    tokens: Tensor
    values: Tensor


class Peaks(NamedTuple):
    """Strongest tokens at flat `positions` (p), sorted by latent, then by descending value.

    `keys` tell texts apart.
    """

    latents: Tensor
    positions: Tensor
    values: Tensor
    keys: Tensor


class Top(NamedTuple):
    """The m strongest contexts of n latents.

    Shapes: peaks (n, m) descending, −inf where there are fewer; keys, sequence_ids (n, m) int64;
    tokens (n, m, window) int32; activations (n, m, window).
    """

    peaks: Tensor
    keys: Tensor
    sequence_ids: Tensor
    tokens: Tensor
    activations: Tensor

    @classmethod
    def empty(cls, n: int, m: int, window: int) -> Top:
        """Return no contexts."""
        return cls(
            torch.full((n, m), -torch.inf),
            torch.zeros(n, m, dtype=torch.int64),
            torch.full((n, m), -1, dtype=torch.int64),
            torch.full((n, m, window), NO_TOKEN, dtype=torch.int32),
            torch.zeros(n, m, window),
        )

    def to(self, device: torch.device) -> Top:
        """Return a copy on `device`."""
        return Top(*(part.to(device) for part in self))


def list_firings(code: Latents, kept: Tensor, n_positions: int) -> Firings:
    """List the active slots of `code` (n, k), whose tokens lie at flat positions `kept` (n)."""
    row, slot = (code.values != 0).nonzero(as_tuple=True)
    latents, tokens = code.indices[row, slot], kept[row]
    keys, order = (latents * n_positions + tokens).sort()
    values = code.values[row, slot].float()
    return Firings(keys, latents[order], tokens[order], values[order])


def sequence_peaks(firings: Firings, shape: torch.Size) -> Peaks:
    """Return each latent's strongest token in each sequence of a (b, t) batch, keys still 0.

    Of equal values the earlier token comes first.
    """
    order = torch.sort(firings.values, descending=True, stable=True).indices
    order = order[torch.sort(firings.latents[order], stable=True).indices]
    groups = firings.latents[order] * shape[0] + firings.tokens[order] // shape[1]
    order = order[_is_first(groups)]
    latents = firings.latents[order]
    values = firings.values[order]
    return Peaks(latents, firings.tokens[order], values, torch.zeros_like(latents))


def distinct_peaks(peaks: Peaks, tokens: Tensor, m: int) -> Peaks:
    """Return each latent's m strongest peaks whose texts in `tokens` (b, t) differ, with keys."""
    keys = _text_keys(peaks.positions, tokens)
    # Runs of one latent and one text: sorted by text, then stably by latent.
    by_text = torch.sort(keys, stable=True).indices
    order = by_text[torch.sort(peaks.latents[by_text], stable=True).indices]
    starts = _starts_run(peaks.latents[order]) | _starts_run(keys[order])
    is_distinct = torch.zeros_like(starts)
    is_distinct[order[starts]] = True
    found = Peaks(*(part[is_distinct] for part in peaks._replace(keys=keys)))
    is_best = rank_in_run(found.latents) < m
    return Peaks(*(part[is_best] for part in found))


def windows(
    firings: Firings, peaks: Peaks, tokens: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return tokens and activations (p, window) at `offsets` (window) from the peaks."""
    flat, is_inside = _around(peaks.positions, tokens, offsets)
    wanted = peaks.latents[:, None] * tokens.numel() + flat
    slot = torch.searchsorted(firings.keys, wanted).clamp_(max=len(firings.keys) - 1)
    is_active = is_inside & (firings.keys[slot] == wanted)
    shown = tokens.flatten()[flat].where(is_inside, NO_TOKEN).int()
    return shown, firings.values[slot].where(is_active, 0.0)


def strongest(first: Top, second: Top) -> Top:
    """Return the m strongest contexts of both with different texts; ties keep `first`'s before."""
    m = first.peaks.shape[1]
    both = _sorted(Top(*(torch.cat(pair, 1) for pair in zip(first, second, strict=True))))
    is_filled = both.peaks > -torch.inf
    is_same = (both.keys[:, :, None] == both.keys[:, None, :]) & is_filled[:, None, :]
    is_repeat = is_same.tril(-1).any(2)
    best = _sorted(both._replace(peaks=both.peaks.masked_fill(is_repeat, -torch.inf)))
    is_empty = best.peaks == -torch.inf
    blank = Top(
        best.peaks,
        best.keys.masked_fill(is_empty, 0),
        best.sequence_ids.masked_fill(is_empty, -1),
        best.tokens.masked_fill(is_empty[:, :, None], NO_TOKEN),
        best.activations.masked_fill(is_empty[:, :, None], 0.0),
    )
    return Top(*(part[:, :m] for part in blank))


def rank_in_run(sorted_ids: Tensor) -> Tensor:
    """Return each element's place in its run of equal ids, counted from 0, (p)."""
    place = torch.arange(len(sorted_ids), device=sorted_ids.device)
    return place - torch.cummax(place.where(_starts_run(sorted_ids), 0), 0).values


def _sorted(top: Top) -> Top:
    order = torch.sort(top.peaks, dim=1, descending=True, stable=True).indices
    wide = order[:, :, None].expand(-1, -1, top.tokens.shape[2])
    return Top(*(part.gather(1, order if part.dim() == 2 else wide) for part in top))


def _starts_run(sorted_ids: Tensor) -> Tensor:
    """Mark the first element of each run of equal ids, (p) bool."""
    is_start = torch.ones_like(sorted_ids, dtype=torch.bool)
    is_start[1:] = sorted_ids[1:] != sorted_ids[:-1]
    return is_start


def _is_first(ids: Tensor) -> Tensor:
    """Mark the first of the elements that have equal ids, in any order, (p) bool."""
    by_id, where = torch.sort(ids, stable=True)
    is_first = torch.zeros_like(ids, dtype=torch.bool)
    is_first[where[_starts_run(by_id)]] = True
    return is_first


def _around(positions: Tensor, tokens: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return flat positions (p, w) at `offsets` from `positions`, and which are in the sequence."""
    n_sequence = tokens.shape[1]
    place = (positions % n_sequence)[:, None] + offsets
    flat = (positions[:, None] + offsets).clamp(0, tokens.numel() - 1)
    return flat, (place >= 0) & (place < n_sequence)


def _text_keys(positions: Tensor, tokens: Tensor) -> Tensor:
    """Return a hash (p) int64 of the KEY_TOKENS tokens up to each position."""
    offsets = torch.arange(1 - KEY_TOKENS, 1, device=tokens.device)
    flat, is_inside = _around(positions, tokens, offsets)
    text = tokens.flatten()[flat].long().where(is_inside, NO_TOKEN)
    keys = torch.zeros_like(positions)
    for column in text.unbind(1):
        keys = (keys + column + 2) * HASH_FACTOR
        keys ^= keys >> 29
    return keys
