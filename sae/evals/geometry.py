"""How a dictionary's directions lie: shared dimensions, interference, rank, and the basis.

With decoder rows W (m, d), Ŵ their unit rows, c_ij = Ŵ_i·Ŵ_j, rows of norm 0 left out:
    dimensionality = mean over latents of D_i = ‖W_i‖² / Σ_j (Ŵ_i·W_j)²: 1 where a latent has its
        direction to itself, 1/2 for an antipodal pair
    interference = mean c_ij² over pairs i ≠ j;   interference_over_welch = that over the least
        that m directions in d dimensions can have, (m − d) / (d (m − 1)); undefined for m ≤ d
    mean_abs_cosine = mean |c_ij| over pairs;   largest_cosine = mean over latents of max_j≠i |c_ij|
    duplicates = share of latents with a largest |c_ij| over 0.95
    effective_rank = exp of the entropy of σ_i / Σσ, σ the singular values of Ŵ
    basis_alignment = (kurtosis of Ŵ − its mean over rotations) / its deviation over rotations, the
        kurtosis of a row being d Σ w⁴ / (Σ w²)², mean over rows, of N_ROTATIONS random rotations:
        about N(0, 1) where the axes of the activations are nothing special to the dictionary
`arrays()` has D_i and the largest cosine of every latent. Of a coder that writes several places a
row holds them all.

Source: Elhage et al. 2022, "Toy models of superposition" (D_i; our mean over latents); Welch 1974,
"Lower bounds on the maximum cross correlation of signals" (the mean of squares, first order); Roy
and Vetterli 2007, "The effective rank"; Elhage et al. 2023, "Privileged bases in the transformer
residual stream" (kurtosis; ours is of decoder rows, against rotations of these rows).
Cost: O(m² d) for the pairs in float32, on the coder's device, PAIR_ROWS rows at once; O(m d²) in
float64; N_ROTATIONS · (d³ + min(m, ROTATED_ROWS) d²) for the rotations of evenly spaced rows.
Cannot see: codes (shuffled in time, dead latents, absorption by the encoder) and whether any
direction is one of the data: random directions are near the Welch bound, the axes have a
dimensionality of 1. Rows permuted among latents change no mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.evals.interface import EvalSetup, Label, Seen, Undefined, Value

N_ROTATIONS = 100
ROTATED_ROWS = 2048
PAIR_ROWS = 1024
DUPLICATE = 0.95
SMALLEST_NORM = 1e-8
TOO_FEW = "it needs two latents with a direction"

LABELS = {
    "dimensionality": Label("dimensions that a latent has to itself"),
    "interference": Label("mean squared cosine of two latents", better="lower", best=0),
    "interference_over_welch": Label("the same over the least possible"),
    "mean_abs_cosine": Label("mean |cosine| of two latents", better="lower", best=0),
    "largest_cosine": Label("largest |cosine| with another latent", better="lower", best=0),
    "duplicates": Label("latents for which it is > 0.95", "share", better="lower", best=0),
    "effective_rank": Label("effective rank of the decoder"),
    "basis_alignment": Label("alignment with the axes, z-score"),
}
LATENT_LABELS = {
    "dimensionality": Label("dimensions it has to itself"),
    "largest_cosine": Label("largest |cosine| with another latent"),
}


class Geometry:
    """Read the decoder of `setup.coder`; there is nothing to update.

    Errors: ValueError for a setup without a coder.
    """

    def __init__(self, setup: EvalSetup) -> None:
        if setup.coder is None:
            raise ValueError(
                "geometry must be given the coder; this setup has none. Use `evaluate`, or "
                "`EvalSetup(..., coder=Evaluable(coder, width))`."
            )
        self.setup, self.seen = setup, Seen()
        self.directions = setup.coder.directions()

    def update(self, batch: object) -> None:
        """Take nothing from a batch."""

    def merge(self, other: Geometry) -> None:
        """Take nothing from another: both hold the same dictionary."""

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module; they have no interval, as nothing is sampled."""
        rows = self._rows()
        if len(rows) < 2:
            return {name: Undefined(TOO_FEW) for name in LABELS}
        mean_abs, largest = pair_cosines(rows)
        squared = mean_squared_cosine(rows)
        return {
            "dimensionality": float(dimensionality(rows).mean()),
            "interference": squared,
            "interference_over_welch": _over_welch(squared, *rows.shape),
            "mean_abs_cosine": mean_abs,
            "largest_cosine": float(largest.mean()),
            "duplicates": float((largest > DUPLICATE).double().mean()),
            "effective_rank": effective_rank(_unit(rows)),
            "basis_alignment": basis_alignment(rows, self.setup.seed),
        }

    def arrays(self) -> dict[str, Tensor]:
        """Return dimensionality and largest cosine by latent, NaN for rows of norm 0."""
        has_direction = self._has_direction()
        rows = self._rows()
        if len(rows) < 2:
            return {}
        found = {"dimensionality": dimensionality(rows), "largest_cosine": pair_cosines(rows)[1]}
        arrays = {}
        for name, values in found.items():
            arrays[f"latents/{name}"] = torch.full((len(has_direction),), torch.nan)
            arrays[f"latents/{name}"][has_direction] = values.float().cpu()
        return arrays

    def _has_direction(self) -> Tensor:
        return (self.directions.double().norm(dim=1) >= SMALLEST_NORM).cpu()

    def _rows(self) -> Tensor:
        return self.directions[self._has_direction().to(self.directions.device)].double()


def dimensionality(rows: Tensor) -> Tensor:
    """Return D_i of each row, (m) float64, from rows (m, d) of norm above 0."""
    projected = ((_unit(rows) @ (rows.T @ rows)) * _unit(rows)).sum(1)
    return rows.pow(2).sum(1) / projected


def mean_squared_cosine(rows: Tensor) -> float:
    """Return the mean c_ij² over pairs i ≠ j, from ‖ŴᵀŴ‖² = Σ_ij c_ij²."""
    unit, m = _unit(rows), len(rows)
    return max(float((unit.T @ unit).pow(2).sum() - m) / (m * (m - 1)), 0.0)


def pair_cosines(rows: Tensor) -> tuple[float, Tensor]:
    """Return the mean |c_ij| over pairs i ≠ j, and max_j≠i |c_ij| of each row, (m)."""
    unit, m = _unit(rows).float(), len(rows)
    total, largest = 0.0, []
    for start in range(0, m, PAIR_ROWS):
        cosines = (unit[start : start + PAIR_ROWS] @ unit.T).abs()
        own = torch.arange(len(cosines), device=cosines.device)
        cosines[own, own + start] = 0
        total += float(cosines.sum(dtype=torch.float64))
        largest.append(cosines.amax(1))
    return total / (m * (m - 1)), torch.cat(largest).double().clamp_max(1)


def effective_rank(rows: Tensor) -> float:
    """Return exp of the entropy of the singular values' shares, in [1, min(m, d)]."""
    small = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    values = torch.linalg.eigvalsh(small).clamp_min(0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def basis_alignment(rows: Tensor, seed: int) -> Value:
    """Return the z-score of the rows' kurtosis in their basis against random rotations."""
    m, d = rows.shape
    if d < 2:
        return Undefined("one dimension has no rotation")
    at = torch.linspace(0, m - 1, min(m, ROTATED_ROWS), device=rows.device).round().long()
    unit = _unit(rows[at]).float()
    generator = torch.Generator().manual_seed(seed)
    rotated = torch.stack(
        [_kurtosis(unit @ random_rotation(d, generator).to(unit)) for _ in range(N_ROTATIONS)]
    )
    return float((_kurtosis(unit) - rotated.mean()) / rotated.std())


def _kurtosis(rows: Tensor) -> Tensor:
    rows = rows.double()
    return (rows.shape[1] * rows.pow(4).sum(1) / rows.pow(2).sum(1).pow(2)).mean()


def random_rotation(d: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix (d, d), evenly distributed.

    Source: Mezzadri 2007, "How to generate random matrices from the classical compact groups":
    QR of a Gaussian matrix, columns times the sign of R's diagonal.
    """
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator))
    return q * r.diagonal().sign()


def _over_welch(squared: float, m: int, d: int) -> Value:
    if m <= d:
        return Undefined(f"{m} directions fit into {d} dimensions without interference")
    return squared * d * (m - 1) / (m - d)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)
