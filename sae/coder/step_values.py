"""What schedules say at one step of training, and what a coder uses where nothing trains it."""

from __future__ import annotations

from dataclasses import dataclass

from sae.config import CoderConfig


@dataclass(frozen=True)
class StepValues:
    """The settings of a coder that may change while it trains.

    Attributes:
        k: active latents a token (topk, batchtopk, matching_pursuit). sparsity: factor on the
            sparsity losses, in [0, 1]. p: exponent of the p_norm loss. prefixes: ends of the
            Matryoshka prefixes, increasing, the whole dictionary last; empty: no prefixes.
        reconstruction: factor on the reconstruction's loss.
    """

    k: int
    sparsity: float = 1.0
    p: float = 1.0
    prefixes: tuple[int, ...] = ()
    reconstruction: float = 1.0

    @classmethod
    def fixed(cls, cfg: CoderConfig) -> StepValues:
        """Return what `cfg`, resolved, says without any schedule."""
        ends = (*cfg.prefixes, cfg.d_sae or 0) if cfg.prefixes else ()
        return cls(k=cfg.k, prefixes=ends)
