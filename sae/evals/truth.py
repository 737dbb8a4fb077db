"""What the evals on a world are told: its features, and each row's true codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sae.evals.interface import EvalBatch


@dataclass(frozen=True)
class Truth:
    """What is known of the world, and the dictionary's decoder.

    Attributes:
        directions: (n_features, d_in) unit rows. bias: (d_in).
        decoder: (d_sae, d_in), what each latent writes.
        frequent: (at most d_sae) int64, the features of the oracle.
        pairs: (p, 2) int64, parent and child; p may be 0.
    """

    directions: Tensor
    bias: Tensor
    decoder: Tensor
    frequent: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class TruthBatch(EvalBatch):
    """Rows of a world with their true codes (n, n_features); a document id is a row's number."""

    codes: Tensor
