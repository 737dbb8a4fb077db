"""Normalisation: the units in which a coder is trained, and the way back to raw ones.

| kind | x in training units |
|---|---|
| none | x |
| mean_norm | x · √d / E‖x‖ |
| standardise | (x − μ) / σ, by dimension |
| whiten | (x − μ) C^(−½), C the covariance (ZCA: the whitening that moves x least) |
| layer_norm | (x − m) / (s + 1e-5), by token: `coder.layer_norm` |

All but none bring the norm of x to √d, in the mean or the root mean square, so that learning rates
and coefficients mean the same. Statistics are of a calibration sample, over all processes: their
sums are added up, never the normalisers averaged.

**Dead directions.** A variance (of a dimension, or along an eigenvector of C) below FLOOR times the
mean variance is raised to that: what never varied stays near 0, and what varies there later is
multiplied by at most 1 / √FLOOR = 100 times the factor of an average direction. The others are then
scaled up so that the mean squared norm is d all the same; where nothing was raised, a standardised
sample has variance 1 in every dimension, and a whitened one the covariance 1.

A trained coder is saved in raw units (`Normaliser.to_raw_units`): the affine kinds are folded into
its tensors, and a layer norm, which is no linear map, stays with the coder.
Source: Bell and Sejnowski 1997 (ZCA); arXiv 2511.13981 (whitened inputs for sparse autoencoders).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.coder import SparseCoder, fold_affine, rescale_code_, to_raw_units, with_layer_norm
from sae.coder.initialisation import OverRanks
from sae.coder.layer_norm import layer_norm, undo_layer_norm
from sae.coder.sites import Sites
from sae.config import NormalisationName

FLOOR = 1e-4
"""Least variance of a direction, in units of the mean variance of all."""
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Normaliser:
    """The map from raw activations to training units, x ← (x − shift) · factor.

    Attributes:
        kind: a row of FITS.
        shift: (d), subtracted first. None: nothing is.
        factor: a number (), one a dimension (d), or a symmetric matrix (d, d). None: 1.
        inverse: what undoes factor, of its shape.

    d is the width of a row; of several places, each has its own statistics, side by side.

    The tensors are float32, and are meant as they are rounded.
    """

    kind: NormalisationName
    shift: Tensor | None = None
    factor: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        sample: Tensor,
        kind: NormalisationName,
        over_ranks: OverRanks = lambda x: x,
        *,
        sites: Sites | None = None,
        is_tied: bool = False,
    ) -> Normaliser:
        """Return the normaliser of `kind` for activations like `sample` (m, d), on its device.

        Args:
            over_ranks: adds a tensor up over the processes that train together, each of which
                gives its own sample, of any size.
            sites: the places of a row; None: one. is_tied: give all written places one factor,
                that of their rows together.

        Errors: ValueError where a sample is too small to whiten by, or a token too narrow to norm.
        """
        columns = sites.columns() if sites else [slice(None)]
        groups = [[place] for place in columns]
        if sites and is_tied:
            n_read = len(sites.reads)
            groups = [*([place] for place in columns[:n_read]), columns[n_read:]]
        fitted: list[Fitted] = []
        for places in groups:
            rows = torch.cat([sample[:, place] for place in places])
            fitted += [FITS[kind](PooledSample(rows, over_ranks))] * len(places)
        joined = fitted[0] if len(fitted) == 1 else _side_by_side(fitted, columns)
        return cls(kind, *(None if part is None else part.float() for part in joined))

    def apply(self, x: Tensor) -> Tensor:
        """Return raw x (n, d_in) in training units, float32; waits for no device."""
        x = x.to(torch.float32)
        if self.kind == "layer_norm":
            return layer_norm(x)
        if self.shift is not None:  # first: a product with a large mean would lose the rest
            x = x - self.shift
        if self.factor is None:
            return x
        return x @ self.factor if self.factor.ndim == 2 else x * self.factor

    def undo(self, x: Tensor, columns: slice, raw: Tensor) -> Tensor:
        """Return x (n, d), in training units, in raw ones; it stands in some columns of a row.

        raw: (n, d), the raw activations that x stands for: a layer norm is undone by them.
        """
        if self.kind == "layer_norm":
            return undo_layer_norm(x, raw)
        if self.inverse is not None:
            inverse = self.inverse
            if inverse.ndim == 2:
                x = x @ inverse[columns, columns]
            else:
                x = x * (inverse[columns] if inverse.ndim else inverse)
        return x if self.shift is None else x + self.shift[columns]

    def to_raw_units(self, coder: SparseCoder) -> SparseCoder:
        """Return a copy of `coder`, trained on `apply(x)`, that works on x.

        Its code is that of training; but for mean_norm it is in raw units, like the activations.
        Decoder rows are of norm 1 where they were, but for standardise and whiten, and where places
        of different scales are written: then about 1.
        """
        if self.kind == "layer_norm":
            return with_layer_norm(coder)
        if (self.factor is None or self.factor.ndim == 0) and self.shift is None:
            return to_raw_units(coder, 1.0 if self.factor is None else float(self.factor))
        assert self.factor is not None
        assert self.inverse is not None
        raw = fold_affine(coder, self.shift, self.factor, self.inverse)
        if self.kind != "mean_norm":
            return raw
        written = [self.factor[place][0].item() for place in coder.sites.columns()]
        written = written[-len(coder.sites.written_widths) :]
        raw.metadata["site_factors"] = [factor / written[0] for factor in written]
        return rescale_code_(raw, 1 / written[0])

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, by name; live tensors, not copies."""
        parts = {"shift": self.shift, "factor": self.factor, "inverse": self.inverse}
        return {name: part for name, part in parts.items() if part is not None}


class PooledSample:
    """A sample (m, d_in) of which every process has a part: its means are over all of them.

    Means are sums in float64, added up over the processes and divided once.
    """

    def __init__(self, rows: Tensor, over_ranks: OverRanks):
        self.rows, self.over_ranks, self.d_in = rows, over_ranks, rows.shape[1]
        n = torch.tensor(len(rows), dtype=torch.float64, device=rows.device)
        self.n = int(over_ranks(n))

    def mean(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mean over tokens of what `total` sums over rows (m, d_in) float64."""
        parts = self.rows.split(ROWS_AT_ONCE)
        summed = total(parts[0].double())
        for part in parts[1:]:
            summed = summed + total(part.double())
        return self.over_ranks(summed) / self.n


Fitted = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Shift, factor and inverse, in float64."""


def fit_nothing(_: PooledSample) -> Fitted:
    """Leave activations as they are."""
    return None, None, None


def fit_mean_norm(sample: PooledSample) -> Fitted:
    """Divide by E‖x‖ / √d; by 1 where all tokens are 0."""
    mean_norm = sample.mean(lambda x: x.norm(dim=1).sum())
    size = torch.where(mean_norm > 0, mean_norm / sample.d_in**0.5, 1.0)
    return None, 1 / size, size


def fit_standardise(sample: PooledSample) -> Fitted:
    """Subtract the mean and divide every dimension by its standard deviation."""
    mean = sample.mean(lambda x: x.sum(0))
    sizes = floored_deviations(sample.mean(lambda x: (x - mean).square().sum(0)))
    return mean, 1 / sizes, sizes


def fit_whiten(sample: PooledSample) -> Fitted:
    """Subtract the mean and divide by the root of the covariance."""
    if sample.n <= sample.d_in:
        raise ValueError(
            "whitening needs more tokens in the calibration sample than `d_in`, better ten times "
            f"as many; got {sample.n} tokens, d_in={sample.d_in}. Raise "
            "`stream.calibration_sequences` (or give more rows), or use "
            "`stream.normalisation: standardise`."
        )
    mean = sample.mean(lambda x: x.sum(0))
    variances, directions = torch.linalg.eigh(sample.mean(lambda x: (x - mean).T @ (x - mean)))
    sizes = floored_deviations(variances)
    return mean, _symmetric(directions, 1 / sizes), _symmetric(directions, sizes)


def fit_layer_norm(sample: PooledSample) -> Fitted:
    """Estimate nothing: every token is normed by itself."""
    if sample.d_in < 2:
        raise ValueError(
            "layer norm needs tokens of at least two numbers; got d_in=1. Use "
            "`stream.normalisation: standardise`."
        )
    return None, None, None


def floored_deviations(variances: Tensor) -> Tensor:
    """Return what to divide directions of these variances (d) by: see the module for FLOOR.

    1 where nothing varies at all.
    """
    mean = variances.mean()
    floored = variances.clamp_min(FLOOR * mean)
    left = (variances.clamp_min(0) / floored).mean().sqrt()  # 1 where nothing was raised
    return torch.where(mean > 0, floored.sqrt() * left, 1.0)


def _side_by_side(fitted: list[Fitted], columns: list[slice]) -> Fitted:
    """Return the shift and factors of a row from those of its places."""
    shifts, *factors = zip(*fitted, strict=True)
    shift = None if shifts[0] is None else torch.cat(shifts)
    if factors[0][0] is None:
        return shift, None, None
    if factors[0][0].ndim == 2:
        return shift, torch.block_diag(*factors[0]), torch.block_diag(*factors[1])
    widths = [place.stop - place.start for place in columns]
    factor, inverse = (
        torch.cat([part.expand(width) for part, width in zip(parts, widths, strict=True)])
        for parts in factors
    )
    return shift, factor, inverse


def _symmetric(directions: Tensor, eigenvalues: Tensor) -> Tensor:
    """Return the matrix of these eigenvectors, the columns of `directions`; exactly symmetric."""
    matrix = (directions * eigenvalues) @ directions.T
    return (matrix + matrix.T) / 2


FITS: dict[NormalisationName, Callable[[PooledSample], Fitted]] = {
    "none": fit_nothing,
    "mean_norm": fit_mean_norm,
    "standardise": fit_standardise,
    "whiten": fit_whiten,
    "layer_norm": fit_layer_norm,
}
