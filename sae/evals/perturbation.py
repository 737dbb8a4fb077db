"""Targeted probe perturbation on a world: does ablating a concept's latents remove that concept?

For each of the `N_CONCEPTS` most frequent features c a linear probe w_c (class-balanced least
squares on x) says whether c is on. The n latents whose mean is larger by most on rows with c than
without, S_c, are ablated with the error term kept, x − Σ_{k in S_c} z_k d_k, and with A the
balanced accuracy of probes,
    effect(c, c') = A_c' before − A_c' after ablating S_c
    tpp_n = mean over c of [effect(c, c) − mean over c' ≠ c of effect(c, c')]
Probes and latents come from even rows, accuracies from odd ones. Baselines put others in place of
S_c: `tpp_difference` projects out the difference of means between rows with c and without,
`tpp_random_direction` a random one, `tpp_random_latent` ablates a random latent.
Source: Karvonen et al. 2025, "SAEBench" (arXiv 2503.09532; targeted probe perturbation after Marks
et al. 2024); deviations: probes by least squares, concepts are a world's features.

Memory: the first `N_ROWS` rows, whichever process sees them: x, and their codes; to compute, these
codes dense.
Cannot see: absorption and noise fitting (docs/defects.md); what latents do where no concept is;
anything beyond the linear probe. It is not bounded by the truth's value: never divide by that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.blocks import N_BLOCKS
from sae.evals.bootstrap import with_intervals
from sae.evals.interface import EvalSetup, Label, Seen, Undefined, Value
from sae.evals.truth import Truth, TruthBatch

N_ROWS = 16_384
N_CONCEPTS = 32
SIZES = (1, 5)
RIDGE = 1e-3
NO_CONCEPT = "fewer than two features are both on and off in each half of the rows"

LABELS = {
    "tpp_probe_accuracy": Label("probes of the true features, balanced accuracy"),
    **{
        f"tpp_{n}": Label(f"concept lost by ablating its {n}, less what others lose") for n in SIZES
    },
    "tpp_difference": Label("the same along the difference of means"),
    "tpp_random_direction": Label("the same along a random direction"),
    "tpp_random_latent": Label("the same by a random latent"),
}
CANNOT_SEE = ("absorption", "noise fitting", "latents without a concept", "rare features")


class Perturbation:
    """Accumulates what `LABELS` lists."""

    def __init__(self, setup: EvalSetup) -> None:
        if setup.truth is None:
            raise ValueError("perturbation needs a world's truth; got None. Give `truth`.")
        self.setup, self.seen = setup, Seen()
        self.truth: Truth = setup.truth
        self._parts: list[tuple[Tensor, Tensor, Latents, Tensor]] = []

    def update(self, batch: TruthBatch) -> None:
        """Keep those of the batch's rows that are among the first."""
        is_in = batch.document_ids < N_ROWS
        self.seen.update(batch.document_ids[is_in])
        is_on = batch.codes[is_in][:, self._concepts.to(batch.codes.device)] > 0
        code = Latents(*(part[is_in].cpu() for part in batch.latents))
        numbers, x = batch.document_ids[is_in].cpu(), batch.x[is_in].float().cpu()
        self._parts.append((numbers, x, code, is_on.cpu()))

    def merge(self, other: Perturbation) -> None:
        """Add another's rows."""
        self.seen.merge(other.seen)
        self._parts += other._parts

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module, with intervals over rows."""
        if not self._parts:
            return dict.fromkeys(LABELS, Undefined(NO_CONCEPT))
        numbers, x, dense, is_on = self._rows()
        is_train = numbers % 2 == 0
        counts = [is_on[rows].sum(0) for rows in (is_train, ~is_train)]
        sizes = [int(is_train.sum()), int((~is_train).sum())]
        both = zip(counts, sizes, strict=True)
        usable = torch.stack([(n > 0) & (n < size) for n, size in both]).all(0)
        if int(usable.sum()) < 2:
            return dict.fromkeys(LABELS, Undefined(NO_CONCEPT))
        is_on = is_on[:, usable]
        fitted = _Fitted(x[is_train], dense[is_train], is_on[is_train])
        scored = (x[~is_train], dense[~is_train])
        changes = self._changes(fitted, *scored)
        blocks = (numbers[~is_train] // 2) % N_BLOCKS
        hits = _Hits(fitted.scores(scored[0]), is_on[~is_train], blocks)
        present = torch.zeros(N_BLOCKS, dtype=torch.bool)
        present[blocks] = True
        return with_intervals(
            lambda weights: hits.metrics(weights, changes),
            present,
            seed=self.setup.seed,
            n_resamples=self.setup.n_resamples,
            reasons=dict.fromkeys(LABELS, NO_CONCEPT),
        )

    def arrays(self) -> dict[str, Tensor]:
        """Return nothing: all of this module's results are numbers."""
        return {}

    @property
    def _concepts(self) -> Tensor:
        return self.truth.frequent[:N_CONCEPTS]

    def _rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return all rows in the order of their numbers: numbers, x, codes, concepts."""
        d_sae = self.setup.d_sae
        dense = torch.cat([part[2].to_dense(d_sae).float() for part in self._parts])
        numbers = torch.cat([part[0] for part in self._parts])
        x = torch.cat([part[1] for part in self._parts])
        is_on = torch.cat([part[3] for part in self._parts])
        order = numbers.argsort(stable=True)
        return numbers[order], x[order], dense[order], is_on[order]

    def _changes(self, fitted: _Fitted, x: Tensor, dense: Tensor) -> dict[str, Tensor]:
        """Return by metric what is subtracted from the probes' scores, (concepts, n, probes)."""
        generator = torch.Generator().manual_seed(self.setup.seed)
        n_concepts = fitted.probes.shape[1]
        read = self.truth.decoder.float() @ fitted.probes
        by_latent = {f"tpp_{n}": fitted.latents(n) for n in SIZES if n <= self.setup.d_sae}
        by_latent["tpp_random_latent"] = torch.randint(
            self.setup.d_sae, (n_concepts, 1), generator=generator
        )
        random = torch.randn(n_concepts, x.shape[1], generator=generator)
        directions = {"tpp_difference": fitted.difference, "tpp_random_direction": random}
        changes = {
            name: torch.stack([dense[:, chosen] @ read[chosen] for chosen in latents])
            for name, latents in by_latent.items()
        }
        for name, rows in directions.items():
            unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
            along = (x - fitted.mean) @ unit.T
            changes[name] = along.T[:, :, None] * (unit @ fitted.probes)[:, None, :]
        return changes


class _Fitted:
    """Probes, and what tells a concept's rows from others, from the rows for fitting.

    Shapes: x (n, d), dense (n, d_sae), is_on (n, concepts); probes (d, concepts).
    """

    def __init__(self, x: Tensor, dense: Tensor, is_on: Tensor) -> None:
        on, off = (part.float() / part.sum(0) for part in (is_on, ~is_on))
        self.mean = x.mean(0)
        self.difference = (on - off).T @ x
        self.contrast = (on - off).T @ dense
        centred = x - self.mean
        covariance = centred.T @ centred / len(x)
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean().clamp_min(1e-12))
        self.probes = torch.linalg.solve(covariance, self.difference.T)
        middle = (on + off).T @ centred / 2
        self.thresholds = (middle.T * self.probes).sum(0)

    def latents(self, n: int) -> Tensor:
        """Return each concept's n latents of the largest contrast, (concepts, n)."""
        return self.contrast.topk(n, dim=1).indices

    def scores(self, x: Tensor) -> Tensor:
        """Return the probes' scores (n, concepts); above 0 a probe says that its concept is on."""
        return (x - self.mean) @ self.probes - self.thresholds


class _Hits:
    """Balanced accuracies of probes by weighted blocks of rows."""

    def __init__(self, scores: Tensor, is_on: Tensor, blocks: Tensor) -> None:
        self.scores, self.is_on, self.blocks = scores, is_on, blocks
        self.n_on, self.n_off = self._by_block(is_on), self._by_block(~is_on)

    def metrics(self, weights: Tensor, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return every metric for weights (r, blocks), (r) each."""
        before = self._accuracy(weights, self.scores)
        found = {"tpp_probe_accuracy": before.mean(1)}
        for name, change in changes.items():
            gap = torch.zeros(len(weights), dtype=torch.float64)
            for concept, subtracted in enumerate(change):
                effect = before - self._accuracy(weights, self.scores - subtracted)
                own = effect[:, concept]
                gap += own - (effect.sum(1) - own) / (effect.shape[1] - 1)
            found[name] = gap / len(change)
        return found

    def _accuracy(self, weights: Tensor, scores: Tensor) -> Tensor:
        """Return each probe's balanced accuracy, (r, probes)."""
        says = scores > 0
        right_on = weights @ self._by_block(says & self.is_on) / (weights @ self.n_on)
        right_off = weights @ self._by_block(~says & ~self.is_on) / (weights @ self.n_off)
        return (right_on + right_off) / 2

    def _by_block(self, counted: Tensor) -> Tensor:
        sums = torch.zeros(N_BLOCKS, counted.shape[1], dtype=torch.float64)
        return sums.index_add_(0, self.blocks, counted.double())
