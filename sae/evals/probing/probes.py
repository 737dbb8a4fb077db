"""One concept's probes: which latents tell it best, and how well, on rows that chose nothing.

Half of a task's rows hold its concept. `train` rows choose and fit, `test` rows score.
    contrast of latent j   |mean z_j on − mean z_j off| / mean of |z_j| where it fires
    k-sparse probe         logistic regression on the k latents of largest contrast, L1, of the
                           strength that ranks a fifth of the training rows best (AUROC)
    one-latent loss        nats a row of the best of CANDIDATES one-latent logistic probes, best on
                           training rows; log 2 says nothing
Baselines, probed alike: raw neurons (columns of x) and principal components, of which those with
the largest |difference of means| / deviation are taken. The ceiling: logistic regression on all of
x, L2. The null: the best latent for labels that were dealt out anew.
Source: Kantamneni et al. 2025 (arXiv 2502.16681: contrast, the k largest, L1 or L2 by validation);
Gao et al. 2024 (arXiv 2406.04093, one-latent loss; there over all latents). Deviations: few
strengths, and codes are brought to unit deviation first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.judging.auroc import auroc_of

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

SIZES = (1, 2, 5, 16)
CANDIDATES = 5
STRENGTHS, STRENGTHS_WHOLE = (0.1, 1.0, 10.0), (1e-3, 1e-2, 0.1, 1.0, 10.0)
VALIDATION = 5
NEEDS_SKLEARN = (
    "probes need the Python package 'scikit-learn', which is not installed here. Run `pip install "
    "'scikit-learn>=1.8'`."
)


class Part(NamedTuple):
    """Rows of one part of a task: x (n, d), latents (n, k), is_on (n) bool."""

    x: Tensor
    latents: Latents
    is_on: Tensor


class Scores(NamedTuple):
    """What a probe says of the test rows."""

    auroc: float
    balanced_accuracy: float
    loss: float


@contextmanager
def quick_fits() -> Iterator[None]:
    """Leave out scikit-learn's checks, which take longer than a small fit does.

    Fits that stop early where classes are separable say so no more: they rank rows as well.

    Errors: RuntimeError where scikit-learn is not installed.
    """
    try:
        import sklearn
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        raise RuntimeError(NEEDS_SKLEARN) from error
    checks = sklearn.config_context(assume_finite=True, skip_parameter_validation=True)
    with checks, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def probe_latents(train: Part, test: Part, d_sae: int) -> tuple[dict[str, float], Tensor]:
    """Return `auroc_K`, `balanced_K` for each of SIZES and `loss`, and the latents chosen."""
    chosen = contrasts(train.latents, train.is_on, d_sae).topk(min(SIZES[-1], d_sae)).indices
    columns = (dense_columns(train.latents, chosen), dense_columns(test.latents, chosen))
    found = _sparse_probes(*columns, train.is_on, test.is_on)
    named = {f"auroc_{k}": scores.auroc for k, scores in found.items()}
    named |= {f"balanced_{k}": scores.balanced_accuracy for k, scores in found.items()}
    return {**named, "loss": _one_latent_loss(*columns, train.is_on, test.is_on)}, chosen


def probe_columns(train: Tensor, test: Tensor, on: tuple[Tensor, Tensor]) -> dict[int, float]:
    """Return the AUROC by size of probes on the best columns of (n, d); on: each part's labels."""
    mean_on, mean_off = train[on[0]].mean(0), train[~on[0]].mean(0)
    contrast = (mean_on - mean_off).abs() / train.std(0).clamp_min(1e-12)
    chosen = contrast.topk(min(SIZES[-1], train.shape[1])).indices
    found = _sparse_probes(train[:, chosen], test[:, chosen], *on)
    return {k: scores.auroc for k, scores in found.items()}


def probe_whole(train: Tensor, test: Tensor, on: tuple[Tensor, Tensor]) -> Scores:
    """Return the scores of logistic regression on all of x."""
    centre = train.mean(0)
    scale = (train - centre).pow(2).mean().sqrt().clamp_min(1e-12)
    if len(train) < train.shape[1]:
        # With L2 the best weights lie in the span of the rows: the same probe in fewer dimensions.
        basis = torch.linalg.qr((train - centre).T).Q
        train, test, centre = train @ basis, test @ basis, centre @ basis
    fitted, scored = (((part - centre) / scale).double().numpy() for part in (train, test))
    return _fit_and_score(fitted, scored, *on, is_sparse=False)


def shuffled_auroc(train: Part, test: Part, d_sae: int, generator: torch.Generator) -> float:
    """Return the AUROC of the best latent for labels dealt out anew, in both parts."""
    on, test_on = (
        part.is_on[torch.randperm(len(part.is_on), generator=generator)] for part in (train, test)
    )
    chosen = contrasts(train.latents, on, d_sae).topk(1).indices
    columns = (dense_columns(train.latents, chosen), dense_columns(test.latents, chosen))
    return _sparse_probes(*columns, on, test_on, sizes=(1,))[1].auroc


def contrasts(latents: Latents, is_on: Tensor, d_sae: int) -> Tensor:
    """Return each latent's contrast between rows with the concept and without, (d_sae)."""
    weights = torch.where(is_on, 1 / is_on.sum(), -1 / (~is_on).sum()).double()
    values, indices = latents.values.double(), latents.indices.flatten()
    sums = torch.zeros(3, d_sae, dtype=torch.float64)
    for row, part in zip(
        sums, (values * weights[:, None], values.abs(), (values != 0).double()), strict=True
    ):
        row.index_add_(0, indices, part.flatten())
    difference, total, fired = sums
    return difference.abs() * fired / total.clamp_min(1e-12)


def dense_columns(latents: Latents, chosen: Tensor) -> Tensor:
    """Return the values of chosen latents (c), (n, c)."""
    is_mine = latents.indices[:, :, None] == chosen
    return (latents.values[:, :, None] * is_mine).sum(1)


def _sparse_probes(
    train: Tensor, test: Tensor, on: Tensor, test_on: Tensor, sizes: tuple[int, ...] = SIZES
) -> dict[int, Scores]:
    """Return the scores of probes on the first k columns of (n, c), by k."""
    train_z, test_z = _standardised(train, test)
    return {
        k: _fit_and_score(train_z[:, :k], test_z[:, :k], on, test_on, is_sparse=True) for k in sizes
    }


def _one_latent_loss(train: Tensor, test: Tensor, on: Tensor, test_on: Tensor) -> float:
    train_z, test_z = _standardised(train, test)
    best = (np.inf, np.inf)
    for column in range(min(CANDIDATES, train_z.shape[1])):
        one = slice(column, column + 1)
        model = _model(1.0, is_sparse=False).fit(train_z[:, one], on.numpy())
        losses = (_loss(model, train_z[:, one], on), _loss(model, test_z[:, one], test_on))
        best = min(best, losses)
    return best[1]


def _standardised(train: Tensor, test: Tensor) -> list[np.ndarray]:
    mean, deviation = train.mean(0), train.std(0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return [((part - mean) / deviation).double().numpy() for part in (train, test)]


def _fit_and_score(
    train: np.ndarray, test: np.ndarray, on: Tensor, test_on: Tensor, *, is_sparse: bool
) -> Scores:
    strength = 1.0 if train.shape[1] == 1 else _best_strength(train, on, is_sparse)
    model = _model(strength, is_sparse=is_sparse).fit(train, on.numpy())
    says = torch.from_numpy(model.decision_function(test))
    right_on, right_off = (says[test_on] > 0).double(), (says[~test_on] <= 0).double()
    balanced = float(right_on.mean() + right_off.mean()) / 2
    return Scores(auroc_of(says[test_on], says[~test_on]), balanced, _loss(model, test, test_on))


def _best_strength(train: np.ndarray, on: Tensor, is_sparse: bool) -> float:
    """Return the strength whose probe, fitted on four fifths of the rows, ranks the fifth best."""
    is_tried = torch.zeros_like(on)
    for rows in (on.nonzero()[:, 0], (~on).nonzero()[:, 0]):
        is_tried[rows[::VALIDATION]] = True
    fitted, tried = (~is_tried).numpy(), is_tried.numpy()
    scores = []
    strengths = STRENGTHS if is_sparse else STRENGTHS_WHOLE
    for strength in strengths:
        model = _model(strength, is_sparse=is_sparse).fit(train[fitted], on[~is_tried].numpy())
        says = torch.from_numpy(model.decision_function(train[tried]))
        scores.append(auroc_of(says[on[is_tried]], says[~on[is_tried]]))
    return strengths[int(np.argmax(scores))]


def _model(strength: float, *, is_sparse: bool) -> LogisticRegression:
    # Importing it takes a second, and only probes need it.
    from sklearn.linear_model import LogisticRegression

    options: dict[str, Any] = {"solver": "lbfgs"}
    if is_sparse:
        options = {"solver": "liblinear", "l1_ratio": 1.0, "random_state": 0, "tol": 1e-3}
    return LogisticRegression(C=strength, max_iter=1000, **options)


def _loss(model: LogisticRegression, rows: np.ndarray, on: Tensor) -> float:
    says = torch.from_numpy(model.decision_function(rows))
    return float(torch.nn.functional.binary_cross_entropy_with_logits(says, on.double()))
