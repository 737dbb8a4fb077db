"""How far a batch is from independent draws, told by how often two of its rows share a document.

Rows of one document are alike, so a buffer that mixes badly gives batches with many pairs of rows
from one document. Of n rows drawn at random from N, c_d of them from document d, the expected share
of such pairs is Σ c_d (c_d − 1) / (N (N − 1)).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae.stream.lanes import Lane


def mixing(lanes: Sequence[Lane]) -> dict[str, float]:
    """Return what the last batch says of the shuffle.

    same_document_pairs: share of its pairs of rows that come from one document.
    pairs_over_buffer, pairs_over_text: that share over what draws from the buffers, and from all
    text so far, would give; 1 is perfect. The second tells whether the buffer is large enough. Left
    out where no pair is expected.
    """
    share = pair_share([lane.buffer.last_documents for lane in lanes])
    buffer = pair_share([lane.buffer.documents for lane in lanes])
    n = sum(lane.n_rows for lane in lanes)
    in_text = sum(lane.n_squared for lane in lanes) - n
    text = in_text / (n * (n - 1)) if n > 1 else 0.0
    values = {"same_document_pairs": share}
    for name, expected in (("pairs_over_buffer", buffer), ("pairs_over_text", text)):
        if expected:
            values[name] = share / expected
    return values


def pair_share(lanes: Sequence[Tensor]) -> float:
    """Return the share of pairs of rows that are from one document; lanes share none.

    Each tensor holds document indices, one a row; −1 is none.
    """
    n, same = 0, 0
    for documents in lanes:
        counts = torch.bincount(documents + 1)[1:]
        n += int(counts.sum())
        same += int((counts * (counts - 1)).sum())
    return same / (n * (n - 1)) if n > 1 else 0.0
