"""Whether a dictionary found the features of a world whose features are known.

With true directions G (n, d_in) and codes A (N, n), decoder rows D (m, d_in), the dictionary's code
Z (N, m), and C = |D̂ Ĝᵀ| of their unit rows:
    mcc = mean C over the min(m, n) one-to-one pairs with the largest sum
    recovered_0.8, recovered_0.9 = share of those pairs with C at least that
    mmcs_latents = mean over latents of max_j C_kj;    mmcs_features = mean over features, max_k
    uniqueness = number of different argmax_j C_kj, over m
    precision, recall, f1 = of latent k (Z ≠ 0) as a detector of feature argmax_j C_kj (A > 0), 0
        where undefined, mean over all m latents; f1_of_alive: over those that fired
    f1_act = the same, of the feature with the best F1 on the even rows, scored on the odd ones
    code_mcc = as mcc, with |correlation| of Z's and A's columns in place of C
    magnitude_r2 = squared correlation of Z_k and A_j, j = argmax_j C_kj, over rows in which both
        fire; mean over latents with at least MIN_MAGNITUDES such rows
    ev_oracle = explained variance of the min(m, n) most frequent true features with true codes
    ev_minus_oracle = explained variance less that: above 0 it fits what a dictionary of features
        cannot
    parent_recall_child_on, parent_recall_child_off = for pairs of a parent and a child, how often
        the latent nearest to the parent fires in rows with this child, and in rows of the parent
        with none of its children; the first over pairs whose second is at least DETECTED: a parent
        that is not found cannot be absorbed. pairs_detected is their share.
`arrays()` has each latent's feature, cosine and F1, each feature's firing rate, and by tenth of the
features (the most frequent first) their mean rate, nearest cosine, share with a cosine of at least
0.9, and F1 of the best latent that is nearest to each.

Source: arXiv 2602.14687 (F1 by nearest direction, uniqueness); arXiv 2505.20254 (mcc).
Intervals: for the explained variances. For the others the spread over training seeds is many times
the error of some ten thousand rows.
Cost: `cofiring`; the two assignments are O(min(m, n)² max(m, n)) at the end.
Cannot see: mcc, mmcs, recovered and uniqueness look at the decoder alone, and are the same where
codes are shuffled in time; random directions have a uniqueness near 0.9. f1_act, code_mcc and
magnitude_r2 do not look at what a latent writes: f1_act and code_mcc are the same where decoder
rows are permuted. f1 sees both; it does not see magnitudes, nor a feature that several latents
share. Parents' recall does not see what fires in the parent's place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.latents import from_dense
from sae.evals.blocks import BlockSums, BlockVariance, block_of
from sae.evals.bootstrap import with_intervals
from sae.evals.cofiring import HALVES, Cofiring
from sae.evals.families import Families
from sae.evals.interface import EvalSetup, Label, Seen, Undefined, Value
from sae.evals.matching import absolute_cosines, assigned
from sae.evals.truth import TruthBatch

RECOVERED = (0.8, 0.9)
MIN_MAGNITUDES = 10
N_GROUPS = 10
BOTH_FIRE = ("z", "z2", "a", "a2", "za")

LABELS = {
    "f1": Label("F1 of latents as detectors of their nearest feature", better="higher", best=1),
    "precision": Label("their precision", better="higher", best=1),
    "recall": Label("their recall", better="higher", best=1),
    "f1_of_alive": Label("F1, of latents that fired", better="higher", best=1),
    "f1_act": Label("F1 of the feature that each fires most like", better="higher", best=1),
    "mcc": Label("mean cosine of features and latents, one to one", better="higher", best=1),
    "recovered_0.8": Label("of these, with a cosine ≥ 0.8", "share", better="higher", best=1),
    "recovered_0.9": Label("of these, with a cosine ≥ 0.9", "share", better="higher", best=1),
    "mmcs_latents": Label(
        "mean cosine of a latent with its nearest feature", better="higher", best=1
    ),
    "mmcs_features": Label(
        "mean cosine of a feature with its nearest latent", better="higher", best=1
    ),
    "uniqueness": Label("different nearest features, over latents", better="higher", best=1),
    "code_mcc": Label("mean correlation of codes, one to one", better="higher", best=1),
    "magnitude_r2": Label("R² of magnitudes where both fire", better="higher", best=1),
    "ev_oracle": Label("explained variance of the most frequent true features"),
    "ev_minus_oracle": Label("explained variance above theirs", better="higher"),
    "true_l0": Label("true features a row"),
    "parent_recall_child_on": Label(
        "parents found where a child fires too", better="higher", best=1
    ),
    "parent_recall_child_off": Label("parents found where no child fires", better="higher", best=1),
    "pairs_detected": Label("parents found in ≥ 70% of those", "share"),
}


class GroundTruth:
    """Accumulate the sums behind the metrics of this module.

    Errors: ValueError for a setup without `truth`.
    """

    def __init__(self, setup: EvalSetup) -> None:
        self.setup, self.seen = setup, Seen()
        self.truth = setup.require_truth("ground_truth")
        self.cosines = absolute_cosines(self.truth.decoder, self.truth.directions)
        m, n = self.cosines.shape
        self.nearest = self.cosines.argmax(1)
        self.cofiring = Cofiring(m, n)
        self.matched = torch.zeros(len(BOTH_FIRE), m, dtype=torch.float64)
        self.families = Families(self.truth.pairs, self.cosines.argmax(0))
        self.sums = BlockSums(("error", "oracle_error"))
        self.variance = BlockVariance(setup.d_in)

    def update(self, batch: TruthBatch) -> None:
        """Add n rows."""
        codes, x = batch.codes.cpu(), batch.x.cpu()
        latents = type(batch.latents)(*(part.cpu() for part in batch.latents))
        document_ids = batch.document_ids.cpu()
        self.seen.update(document_ids)
        self.cofiring.update(latents, from_dense(codes), document_ids % HALVES)
        z = latents.to_dense(self.setup.d_sae)
        self.families.update(z != 0, codes > 0)
        self.matched += _sums_where_both(z.double(), codes[:, self.nearest].double())
        blocks = block_of(document_ids)
        errors = {
            "error": (x.double() - batch.x_hat.cpu().double()).pow(2).sum(1),
            "oracle_error": (x.double() - self._oracle(codes)).pow(2).sum(1),
        }
        self.sums.add(blocks, errors)
        self.variance.add(blocks, x)

    def merge(self, other: GroundTruth) -> None:
        """Add another's rows."""
        self.seen.merge(other.seen)
        self.cofiring.merge(other.cofiring)
        self.matched += other.matched
        self.families.merge(other.families)
        self.sums.merge(other.sums)
        self.variance.merge(other.variance)

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module; intervals for the explained variances."""
        if self.seen.n_tokens == 0:
            return {"f1": Undefined("no row was evaluated")}
        return {
            **self._detection(),
            **self._directions(),
            "code_mcc": float(assigned(self.cofiring.correlations()).mean()),
            "magnitude_r2": self._magnitude_r2(),
            **self._explained(),
            "true_l0": float(self.cofiring.feature.sum() / self.seen.n_tokens),
            **self.families.compute(),
        }

    def arrays(self) -> dict[str, Tensor]:
        """Return what is by latent, by feature and by tenth of the features."""
        f1 = self._by_latent()["f1"]
        rates = self.cofiring.feature.sum(0).double() / max(self.seen.n_tokens, 1)
        nearest_cosine = self.cosines.amax(0)
        best = torch.zeros(len(rates), dtype=torch.float64)
        best.scatter_reduce_(0, self.nearest, f1, "amax")
        groups = rates.argsort(descending=True, stable=True).tensor_split(min(N_GROUPS, len(rates)))
        curves = {
            "firing_rate": rates,
            "nearest_cosine": nearest_cosine,
            "recovered_0.9": (nearest_cosine >= RECOVERED[-1]).double(),
            "f1": best,
        }
        return {
            "nearest_feature": self.nearest,
            "nearest_cosine": self.cosines.amax(1),
            "latent_f1": f1,
            "feature_firing_rate": rates,
            **{
                f"tenths_{name}": torch.stack([values[group].mean() for group in groups])
                for name, values in curves.items()
            },
        }

    def _oracle(self, codes: Tensor) -> Tensor:
        of, truth = self.truth.frequent, self.truth
        # In float32 the last digits would depend on how many rows are multiplied at once.
        return codes[:, of].double() @ truth.directions[of].double() + truth.bias.double()

    def _by_latent(self) -> dict[str, Tensor]:
        """Return precision, recall and F1 for the nearest feature, each (m) float64."""
        latents = torch.arange(len(self.nearest))
        hits = self.cofiring.both.sum(0)[latents, self.nearest].double()
        fired = self.cofiring.latent.sum(0)
        wanted = self.cofiring.feature.sum(0)[self.nearest]
        return {
            "precision": hits / fired.clamp_min(1),
            "recall": hits / wanted.clamp_min(1),
            "f1": 2 * hits / (fired + wanted).clamp_min(1),
        }

    def _detection(self) -> dict[str, Value]:
        by_latent, fired = self._by_latent(), self.cofiring.latent.sum(0) > 0
        alive = by_latent["f1"][fired]
        match = self.cofiring.f1(0).argmax(1)
        scored = self.cofiring.f1(1).gather(1, match[:, None])
        has_both = bool((self.cofiring.rows > 0).all())
        return {
            **{name: float(values.mean()) for name, values in by_latent.items()},
            "f1_of_alive": float(alive.mean()) if fired.any() else Undefined("no latent fired"),
            "f1_act": float(scored.mean()) if has_both else Undefined("it needs two rows"),
        }

    def _directions(self) -> dict[str, Value]:
        pairs = assigned(self.cosines)
        return {
            "mcc": float(pairs.mean()),
            **{f"recovered_{t}": float((pairs >= t).double().mean()) for t in RECOVERED},
            "mmcs_latents": float(self.cosines.amax(1).mean()),
            "mmcs_features": float(self.cosines.amax(0).mean()),
            "uniqueness": len(self.nearest.unique()) / len(self.nearest),
        }

    def _magnitude_r2(self) -> Value:
        latents = torch.arange(len(self.nearest))
        count = self.cofiring.both.sum(0)[latents, self.nearest].double()
        z, z2, a, a2, za = self.matched / count.clamp_min(1)
        z_variance, a_variance = z2 - z * z, a2 - a * a
        varies = (z_variance > 1e-12 * z2) & (a_variance > 1e-12 * a2)
        counts = varies & (count >= MIN_MAGNITUDES)
        if not counts.any():
            return Undefined(
                f"no latent fires with its feature in {MIN_MAGNITUDES} rows, both varying"
            )
        r2 = (za - z * a).pow(2)[counts] / (z_variance * a_variance)[counts]
        return float(r2.clamp_max(1).mean())

    def _explained(self) -> dict[str, Value]:
        reason = "the activations do not vary"
        return with_intervals(
            self._statistics,
            self.variance.n > 0,
            seed=self.setup.seed,
            n_resamples=self.setup.n_resamples,
            reasons={"ev_oracle": reason, "ev_minus_oracle": reason},
        )

    def _statistics(self, weights: Tensor) -> dict[str, Tensor]:
        s, squares = self.sums.weighted(weights), self.variance.weighted_squares(weights)
        oracle, own = s["oracle_error"] / squares, s["error"] / squares
        return {"ev_oracle": 1 - oracle, "ev_minus_oracle": oracle - own}


def _sums_where_both(z: Tensor, a: Tensor) -> Tensor:
    """Return Σ z, z², a, a², z a over rows in which both are on, (5, m), from (n, m) each."""
    z, a = torch.where(a > 0, z, 0.0), torch.where(z != 0, a, 0.0)
    return torch.stack([part.sum(0) for part in (z, z * z, a, a * a, z * a)])
