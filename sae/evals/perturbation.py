"""Targeted probe perturbation on a world: does ablating a concept's latents remove that concept?

For each of the `N_CONCEPTS` most frequent features c a linear probe (`targeted`) says whether c is
on. The n latents whose mean is larger by most on rows with c than
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
from sae.evals.targeted import Hits, Probes
from sae.evals.truth import TruthBatch

N_ROWS = 16_384
N_CONCEPTS = 32
SIZES = (1, 5)
NO_CONCEPT = "fewer than two features are both on and off in each half of the rows"

LABELS = {
    "tpp_probe_accuracy": Label("probes of the true features, balanced accuracy"),
    **{
        f"tpp_{n}": Label(
            f"concept lost by ablating its {n}, less what others lose",
            better="higher",
            is_below_truth=False,
        )
        for n in SIZES
    },
    "tpp_difference": Label("the same along the difference of means"),
    "tpp_random_direction": Label("the same along a random direction"),
    "tpp_random_latent": Label("the same by a random latent"),
}
CANNOT_SEE = ("absorption", "noise fitting", "latents without a concept", "rare features")


class Perturbation:
    """Accumulates what `LABELS` lists."""

    def __init__(self, setup: EvalSetup) -> None:
        self.setup, self.seen = setup, Seen()
        self.truth = setup.require_truth("perturbation")
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
        fitted = Probes(x[is_train], is_on[is_train])
        contrast = fitted.on_less_off.T @ dense[is_train]
        scored = (x[~is_train], dense[~is_train])
        changes = self._changes(fitted, contrast, *scored)
        blocks = (numbers[~is_train] // 2) % N_BLOCKS
        hits = Hits(fitted.scores(scored[0]), is_on[~is_train], blocks)
        present = torch.zeros(N_BLOCKS, dtype=torch.bool)
        present[blocks] = True
        return with_intervals(
            lambda weights: {
                "tpp_probe_accuracy": hits.accuracy(weights),
                **hits.gaps(weights, changes),
            },
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

    def _changes(
        self, fitted: Probes, contrast: Tensor, x: Tensor, dense: Tensor
    ) -> dict[str, Tensor]:
        """Return by metric what is subtracted from the probes' scores, (concepts, n, probes).

        Shapes: contrast (concepts, d_sae), how much more each latent fires on each concept.
        """
        generator = torch.Generator().manual_seed(self.setup.seed)
        n_concepts = fitted.probes.shape[1]
        read = self.truth.decoder.float() @ fitted.probes
        sizes = [n for n in SIZES if n <= self.setup.d_sae]
        by_latent = {f"tpp_{n}": contrast.topk(n, dim=1).indices for n in sizes}
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
            changes[name] = fitted.along(rows, x)
        return changes
