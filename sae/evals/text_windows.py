"""Text as items: contexts cut into windows, with each latent's largest activation in each.

The one idea: windows lie side by side and never overlap. Two neighbourhoods of adjacent tokens are
mostly the same words, so a latent that fires on both would look pure for that alone; and an
encoder is run once a window, not once a token. A latent's activation in a window is its largest
|activation| on a token of it: whether it finds there what it looks for, however often.

A window begins every `size` tokens of a context and where the document changes, so it holds text
of one document. Its text are the tokens that count; one in which fewer than half of `size` do is
left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.evals.interface import ContextBatch
from sae.evals.judging.sampling import rank_in_run
from sae.evals.pair_sums import ItemFirings

NO_TOKEN = -1


class TextWindows(NamedTuple):
    """w windows of a batch.

    Shapes: tokens (w, size) int64, those that count, in order, then NO_TOKEN; documents (w) int64;
    window_of (b · t) int64, each token's window, −1 for tokens in none.
    """

    tokens: Tensor
    documents: Tensor
    window_of: Tensor


def cut_windows(batch: ContextBatch, size: int) -> TextWindows:
    """Return the batch's windows, in the order of its text, on the device of its code."""
    device = batch.kept.device
    tokens, documents = (
        part.to(device) for part in (batch.contexts.tokens, batch.contexts.document_ids)
    )
    is_start = (torch.arange(tokens.shape[1], device=device) % size == 0).expand_as(tokens).clone()
    is_start[:, 1:] |= documents[:, 1:] != documents[:, :-1]
    every = is_start.flatten().cumsum(0) - 1
    n_kept = torch.bincount(every[batch.kept], minlength=int(is_start.sum()))
    is_in = 2 * n_kept >= size
    number = torch.where(is_in, is_in.cumsum(0) - 1, -1)
    window_of = torch.full_like(every, -1)
    window_of[batch.kept] = number[every[batch.kept]]
    kept = batch.kept[window_of[batch.kept] >= 0]
    w = int(is_in.sum())
    shown = torch.full((w, size), NO_TOKEN, dtype=torch.int64, device=device)
    shown[window_of[kept], rank_in_run(window_of[kept])] = tokens.flatten()[kept]
    of_window = torch.zeros(w, dtype=torch.int64, device=device)
    of_window[window_of[kept]] = documents.flatten()[kept]
    return TextWindows(shown, of_window, window_of)


def largest_in_windows(batch: ContextBatch, windows: TextWindows) -> ItemFirings:
    """Return each latent's largest |activation| in each window in which it fires."""
    window = windows.window_of[batch.kept]
    row, slot = ((batch.latents.values != 0) & (window >= 0)[:, None]).nonzero(as_tuple=True)
    w = max(len(windows.tokens), 1)
    pairs, place = (batch.latents.indices[row, slot] * w + window[row]).unique(return_inverse=True)
    values = batch.latents.values[row, slot].abs().float()
    largest = values.new_zeros(len(pairs)).scatter_reduce_(0, place, values, "amax")
    return ItemFirings(pairs // w, pairs % w, largest)
