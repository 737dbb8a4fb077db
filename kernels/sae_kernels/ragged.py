"""The ragged form of a sparse code: each token keeps as many latents as it has (CSR).

`values` and `indices` (p,) hold the pairs of all tokens one after the other; those of token i are
`values[offsets[i]:offsets[i + 1]]`. `offsets` (n + 1,) int64 lies on the tensors' device, so
nothing here waits for a GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """A sparse code of n tokens with p pairs in all, tokens ascending, latents ascending in each.

    With a fixed capacity p may exceed `offsets[-1]`: pairs from there on are padding, value 0 and
    index 0, and belong to no token.
    """

    values: Tensor  # (p,)
    indices: Tensor  # (p,) int64, in [0, d_sae)
    offsets: Tensor  # (n + 1,) int64, ascending from 0


def tokens_of_pairs(offsets: Tensor, p: int) -> Tensor:
    """Return (p,) int64: the token of each pair, n for the padding after `offsets[-1]`.

    Found by binary search, not by repeat_interleave, which would have to read the total back.
    """
    pairs = torch.arange(p, device=offsets.device)
    return torch.searchsorted(offsets[1:], pairs, right=True)


def tokens_of_code(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the token of each pair, shaped as `indices`: (..., k), or (p,) with `offsets`.

    Tokens are counted over all leading axes; a ragged code's padding belongs to token n.
    """
    if offsets is not None:
        return tokens_of_pairs(offsets, indices.numel())
    pairs = torch.arange(indices.numel(), device=indices.device)
    return (pairs // max(indices.shape[-1], 1)).reshape(indices.shape)
