"""How much of the activations a dictionary gives back.

With x, x_hat (n, d_in), e = x − x_hat, μ the mean of x over all evaluated tokens:
    fvu = Σ‖e‖² / Σ‖x − μ‖²          explained_variance = 1 − fvu
    mse = Σ‖e‖² / (n d_in)           cosine = mean of ⟨x, x_hat⟩ / (‖x‖ ‖x_hat‖)
    norm_ratio = mean of ‖x_hat‖ / ‖x‖      gamma = Σ‖x_hat‖² / Σ⟨x, x_hat⟩
    fvu_worst_1pct = fvu over the 1% of tokens with the largest ‖e‖, about the same μ.
μ is global: a mean per batch would shrink the denominator and flatter small batches less than large
ones. gamma is 1 for an unbiased reconstruction and below 1 where it is shrunken. A zero vector has
cosine 0; tokens with x = 0 are left out of norm_ratio.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (normalised MSE against the
mean activation); Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse
autoencoders" (relative reconstruction bias gamma).

Worst tokens are found through bins of log2 ‖e‖², BINS_PER_OCTAVE each octave. Whole bins count
exactly; of the bin that holds the 1% mark a share counts, as if its tokens were alike: their ‖e‖²
differ by at most a factor 2^(1/4) = 1.19.

Cost: O(n d_in); memory 2 · 512 · d_in float64.
Cannot see: absorption and splitting; whether latents mean anything (it prefers fitting noise: on a
world of known truth, trained dictionaries exceed the true one); a permuted code paired with an
equally permuted decoder. Masked tokens are not in it: where BOS is masked, reconstructing BOS alone
earns nothing; where it is evaluated, its norm (often 200 times the others') decides every number
here but cosine and norm_ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.evals.blocks import BlockSums, BlockVariance, block_of
from sae.evals.bootstrap import with_intervals
from sae.evals.interface import EvalBatch, EvalSetup, Label, Seen, Undefined, Value

BINS_PER_OCTAVE = 4
LOWEST_OCTAVE = -64
N_BINS = 512
WORST_SHARE = 0.01
SUMS = ("n", "error", "x_hat_squared", "product", "cosine", "norm_ratio", "n_with_norm")
NO_VARIANCE = "the activations do not vary"

LABELS = {
    "fvu": Label("fraction of variance unexplained", better="lower", best=0),
    "explained_variance": Label("explained variance", better="higher", best=1),
    "fvu_worst_1pct": Label("the same on the worst 1% of tokens", better="lower", best=0),
    "mse": Label("squared error per token and dimension", better="lower", best=0),
    "cosine": Label("cosine of x and x_hat", better="higher", best=1),
    "norm_ratio": Label("‖x_hat‖ / ‖x‖"),
    "gamma": Label("reconstruction bias gamma"),
}


class Reconstruction:
    """Accumulate the sums behind the metrics of this module."""

    def __init__(self, setup: EvalSetup) -> None:
        self.setup, self.seen = setup, Seen()
        self.sums = BlockSums(SUMS)
        self.variance = BlockVariance(setup.d_in)
        self.error_bins = BlockSums(("n", "error"), N_BINS)
        self.bin_variance = BlockVariance(setup.d_in, N_BINS)

    def update(self, batch: EvalBatch) -> None:
        """Add n tokens."""
        x, x_hat = batch.x.double(), batch.x_hat.double()
        values = _token_values(x, x_hat)
        blocks, bins = block_of(batch.document_ids), _error_bin(values["error"])
        self.seen.update(batch.document_ids)
        self.sums.add(blocks, values)
        self.variance.add(blocks, x)
        self.error_bins.add(bins, values)
        self.bin_variance.add(bins, x)

    def merge(self, other: Reconstruction) -> None:
        """Add another's tokens."""
        self.seen.merge(other.seen)
        self.sums.merge(other.sums)
        self.variance.merge(other.variance)
        self.error_bins.merge(other.error_bins)
        self.bin_variance.merge(other.bin_variance)

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module; intervals for all but fvu_worst_1pct."""
        reasons = {
            "fvu": NO_VARIANCE,
            "explained_variance": NO_VARIANCE,
            "gamma": "x and x_hat are orthogonal in the mean",
            "norm_ratio": "every activation is 0",
        }
        metrics = with_intervals(
            self._statistics,
            self.variance.n > 0,
            seed=self.setup.seed,
            n_resamples=self.setup.n_resamples,
            reasons=reasons,
        )
        return {**metrics, "fvu_worst_1pct": self._fvu_of_worst()}

    def arrays(self) -> dict[str, Tensor]:
        """Return the mean activation `x_mean`, (d_in) float64."""
        return {"x_mean": self.variance.total_mean()}

    def _statistics(self, weights: Tensor) -> dict[str, Tensor]:
        s = self.sums.weighted(weights)
        fvu = s["error"] / self.variance.weighted_squares(weights)
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "mse": s["error"] / s["n"] / self.setup.d_in,
            "cosine": s["cosine"] / s["n"],
            "norm_ratio": s["norm_ratio"] / s["n_with_norm"],
            "gamma": s["x_hat_squared"] / s["product"],
        }

    def _fvu_of_worst(self) -> Value:
        n = self.error_bins["n"].flip(0)
        wanted = max(WORST_SHARE * float(n.sum()), 1.0)
        taken = ((wanted - (n.cumsum(0) - n)) / n.clamp_min(1)).clamp(0, 1).flip(0)
        squares = taken @ self.bin_variance.squares_about(self.variance.total_mean())
        varies = self.variance.weighted_squares(torch.ones_like(self.variance.n)[None]) > 0
        if not (varies and squares > 0):
            return Undefined(NO_VARIANCE)
        return float(taken @ self.error_bins["error"] / squares)


def _token_values(x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
    """Return each token's share of every sum, (n) float64, from x and x_hat (n, d_in)."""
    norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
    product = (x * x_hat).sum(1)
    has_norm = norm > 0
    return {
        "n": torch.ones_like(norm),
        "error": (x - x_hat).pow(2).sum(1),
        "x_hat_squared": norm_hat.pow(2),
        "product": product,
        "cosine": torch.where(product == 0, 0.0, product / (norm * norm_hat)),
        "norm_ratio": torch.where(has_norm, norm_hat / norm, 0.0),
        "n_with_norm": has_norm.double(),
    }


def _error_bin(error: Tensor) -> Tensor:
    """Return the bin of each squared error, (n) int64 in [0, N_BINS); 0 falls into the lowest."""
    octave = error.clamp_min(2.0**LOWEST_OCTAVE).log2() - LOWEST_OCTAVE
    return (octave * BINS_PER_OCTAVE).floor().long().clamp(0, N_BINS - 1)
