"""How many latents fire on a token, and how often each latent fires.

With Z (n, d_sae) the code; a latent fires where Z ≠ 0 (not > 0: a code may be signed):
    l0, l0_sd, l0_p99 = mean, standard deviation, 99th percentile over tokens of how many fire
    firing rate of latent j = share of the n tokens on which it fires
    dead = share of the d_sae latents that fire on none of the n tokens
    dead_rate_bound = 3 / n: a latent not seen in n tokens has a true rate below it, at 95%
    rate_under_1e-5, rate_under_1e-6 = share of latents with a smaller rate, the dead included
    dense, dense_of_alive = share of all, and of the not dead, that fire on more than 10% of tokens
    kurtosis = mean over latents of E(z − μ)⁴ / (E(z − μ)²)², over all n tokens, of those that vary
        (3 for a normal latent; about 1 / rate for a sparse one)
A rate threshold r is given only where n ≥ 3 / r: fewer tokens can't tell such a rate from another.
`arrays()` has the firing counts, the largest |activation| of each latent (0 for the dead) and the
histogram of log10 rates (HISTOGRAM_EDGES; the dead are in no bin, rates below the lowest edge in
the first).

Source: Jovanovic and Levy 1997, "A look at the rule of three" (3 / n; it takes tokens as
independent, and tokens of one document are not: the true bound is somewhat larger).
Cost: O(n k) and O(d_sae) a batch. L0's percentile is exact (a count for each L0).
Cannot see: whether what fires means anything. Codes shuffled in time, random directions and PCA
score as any dictionary with their L0; kurtosis is highest for PCA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.evals.blocks import BlockSums, block_of
from sae.evals.bootstrap import with_intervals
from sae.evals.interface import EvalBatch, EvalSetup, Label, Seen, Undefined, Value

DENSE_RATE = 0.1
LEAST_VARIANCE = 1e-5
"""Of a latent's mean square: below it, it counts as constant, and float64 has too few digits."""
RARE_RATES = {"rate_under_1e-5": 1e-5, "rate_under_1e-6": 1e-6}
HISTOGRAM_EDGES = torch.linspace(-7, 0, 29, dtype=torch.float64)
"""log10 of the firing rate, four bins a decade."""

LABELS = {
    "l0": Label("L0, latents firing on a token"),
    "l0_sd": Label("its standard deviation"),
    "l0_p99": Label("its 99th percentile", "latents"),
    "dead": Label("latents that never fired", "share", better="lower", best=0),
    "dead_rate_bound": Label("their firing rate is below (95%)"),
    "rate_under_1e-5": Label("latents firing on < 1 in 100,000 tokens", "share"),
    "rate_under_1e-6": Label("latents firing on < 1 in 1,000,000 tokens", "share"),
    "dense": Label("latents firing on > 10% of tokens", "share"),
    "dense_of_alive": Label("the same, of those that fired", "share"),
    "kurtosis": Label("kurtosis of a latent"),
}


class Sparsity:
    """Accumulate counts of firing by token and by latent."""

    def __init__(self, setup: EvalSetup) -> None:
        self.setup, self.seen = setup, Seen()
        self.sums = BlockSums(("n", "l0", "l0_squared"))
        self.tokens_by_l0 = torch.zeros(setup.d_sae + 1, dtype=torch.int64)
        self.firing_counts = torch.zeros(setup.d_sae, dtype=torch.int64)
        self.max_activations = torch.zeros(setup.d_sae)
        self.power_sums = torch.zeros(4, setup.d_sae, dtype=torch.float64)

    def update(self, batch: EvalBatch) -> None:
        """Add n tokens."""
        values, indices = batch.latents
        l0 = batch.latents.l0()
        sums = {"n": torch.ones_like(l0), "l0": l0, "l0_squared": l0 * l0}
        self.seen.update(batch.document_ids)
        self.sums.add(block_of(batch.document_ids), sums)
        fired = values != 0
        d_sae = self.setup.d_sae
        self.tokens_by_l0 += torch.bincount(l0, minlength=d_sae + 1).cpu()
        self.firing_counts += torch.bincount(indices[fired], minlength=d_sae).cpu()
        largest = torch.zeros(d_sae, device=values.device)
        largest.scatter_reduce_(0, indices.flatten(), values.abs().float().flatten(), "amax")
        self.max_activations = torch.maximum(self.max_activations, largest.cpu())
        flat = values.flatten().double()
        for power in range(1, 5):
            added = torch.zeros(d_sae, dtype=torch.float64, device=flat.device)
            added.index_add_(0, indices.flatten(), flat.pow(power))
            self.power_sums[power - 1] += added.cpu()

    def merge(self, other: Sparsity) -> None:
        """Add another's tokens."""
        self.seen.merge(other.seen)
        self.sums.merge(other.sums)
        self.tokens_by_l0 += other.tokens_by_l0
        self.firing_counts += other.firing_counts
        self.max_activations = torch.maximum(self.max_activations, other.max_activations)
        self.power_sums += other.power_sums

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module; an interval for l0."""
        n = self.seen.n_tokens
        if n == 0:
            return {"l0": Undefined("no token was evaluated")}
        l0 = with_intervals(
            lambda weights: _mean_l0(self.sums.weighted(weights)),
            self.sums["n"] > 0,
            seed=self.setup.seed,
            n_resamples=self.setup.n_resamples,
        )
        mean, mean_square = (float(self.sums[name].sum()) / n for name in ("l0", "l0_squared"))
        return {
            **l0,
            "l0_sd": max(mean_square - mean * mean, 0.0) ** 0.5,
            "l0_p99": _percentile_99(self.tokens_by_l0),
            **self._rates(n),
        }

    def arrays(self) -> dict[str, Tensor]:
        """Return firing_counts, max_activations (d_sae), and the histogram with its edges."""
        rates = self.firing_counts[self.firing_counts > 0].double() / max(self.seen.n_tokens, 1)
        log_rates = rates.log10().clamp_min(float(HISTOGRAM_EDGES[0]))
        return {
            "firing_counts": self.firing_counts,
            "max_activations": self.max_activations,
            "log10_firing_rate_histogram": torch.histogram(log_rates, HISTOGRAM_EDGES).hist.long(),
            "log10_firing_rate_edges": HISTOGRAM_EDGES,
        }

    def _rates(self, n: int) -> dict[str, Value]:
        rates = self.firing_counts.double() / n
        n_dense, n_alive = int((rates > DENSE_RATE).sum()), int((rates > 0).sum())
        return {
            "dead": 1 - n_alive / len(rates),
            "dead_rate_bound": min(3 / n, 1.0),
            **{name: _share_under(rates, rate, n) for name, rate in RARE_RATES.items()},
            "dense": n_dense / len(rates),
            "dense_of_alive": n_dense / n_alive if n_alive else Undefined("no latent fired"),
            "kurtosis": self._kurtosis(n),
        }

    def _kurtosis(self, n: int) -> Value:
        """Return the mean over latents that vary, from Σ z … Σ z⁴ of each."""
        first, second, third, fourth = self.power_sums / n
        variance = second - first.pow(2)
        varies = variance > LEAST_VARIANCE * second
        if not varies.any():
            return Undefined("no latent varies")
        central = fourth - 4 * first * third + 6 * first.pow(2) * second - 3 * first.pow(4)
        return float((central[varies] / variance[varies].pow(2)).mean())


def _mean_l0(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"l0": sums["l0"] / sums["n"]}


def _share_under(rates: Tensor, rate: float, n: int) -> Value:
    needed = round(3 / rate)
    if n < needed:
        return Undefined(f"a rate of {rate:g} needs {needed:,} tokens; {n:,} were evaluated")
    return float((rates < rate).double().mean())


def _percentile_99(tokens_by_value: Tensor) -> float:
    """Return the smallest value that at least 99% of tokens do not exceed."""
    # In whole numbers: 0.99 n is no exact float.
    reached = tokens_by_value.cumsum(0) * 100 >= tokens_by_value.sum() * 99
    return float(reached.int().argmax())
