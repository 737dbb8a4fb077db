"""Geometry against slow references, and against dictionaries whose geometry is known."""

from __future__ import annotations

import math

import pytest
import torch
from eval_stand_ins import assert_same
from torch import Tensor
from toy_worlds import gaussian, unit

from sae.evals import activation_contexts, evaluate
from sae.evals.evaluable import Evaluable
from sae.evals.geometry import Geometry
from sae.evals.interface import EvalSetup, Undefined


class Rows:
    """A dictionary of given decoder rows."""

    def __init__(self, rows: Tensor) -> None:
        self.W_dec = rows
        self.d_sae, self.d_in = rows.shape

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.W_dec.T

    def decode(self, dense: Tensor) -> Tensor:
        return dense @ self.W_dec


def geometry(rows: Tensor, seed: int = 0) -> Geometry:
    coder = Evaluable(Rows(rows), rows.shape[1])
    return Geometry(EvalSetup(rows.shape[1], len(rows), seed, coder=coder))


def slow(rows: Tensor) -> dict[str, float]:
    """Every metric but the alignment, pair by pair, in float64."""
    w = [[float(v) for v in row] for row in rows.double()]
    m, d = len(w), len(w[0])
    norms = [math.sqrt(sum(v * v for v in row)) for row in w]
    dots = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in w] for p in w]
    cosines = [[dots[i][j] / norms[i] / norms[j] for j in range(m)] for i in range(m)]
    pairs = [abs(cosines[i][j]) for i in range(m) for j in range(m) if i != j]
    largest = [max(abs(cosines[i][j]) for j in range(m) if j != i) for i in range(m)]
    shared = [sum((dots[i][j] / norms[i]) ** 2 for j in range(m)) for i in range(m)]
    interference = sum(c * c for c in pairs) / len(pairs)
    sigma = torch.linalg.svdvals(rows.double() / rows.double().norm(dim=1, keepdim=True))
    shares = [float(s / sigma.sum()) for s in sigma]
    return {
        "dimensionality": sum(n * n / s for n, s in zip(norms, shared, strict=True)) / m,
        "interference": interference,
        "interference_over_welch": interference / ((m - d) / (d * (m - 1))),
        "mean_abs_cosine": sum(pairs) / len(pairs),
        "largest_cosine": sum(largest) / m,
        "duplicates": sum(c > 0.95 for c in largest) / m,
        "effective_rank": math.exp(-sum(s * math.log(s) for s in shares if s > 0)),
    }


def test_equals_the_slow_reference():
    rows = gaussian(23, 9, seed=0) * torch.linspace(0.2, 3, 23)[:, None]
    rows[5] = rows[4] * 1.5 + 0.01
    found = geometry(rows).compute()
    for name, value in slow(rows).items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert found["duplicates"] > 0


def test_toy_geometries_have_their_published_dimensionality():
    axes = torch.eye(4)
    turns = torch.arange(5) * 2 * math.pi / 5
    pentagon = torch.stack([turns.cos(), turns.sin()], 1)
    for rows, expected in ((axes, 1), (torch.cat([axes, -axes]), 0.5), (pentagon, 0.4)):
        found = geometry(rows)
        assert found.compute()["dimensionality"] == pytest.approx(expected, rel=1e-6)
        by_latent = found.arrays()["latents/dimensionality"]
        assert by_latent.tolist() == pytest.approx([expected] * len(rows), rel=1e-6)
    tight = geometry(pentagon).compute()
    assert tight["interference_over_welch"] == pytest.approx(1)
    assert tight["effective_rank"] == pytest.approx(2)
    assert isinstance(geometry(axes).compute()["interference_over_welch"], Undefined)


def test_rotating_the_data_changes_nothing_but_the_alignment():
    rows = torch.eye(12) + 0.1 * gaussian(12, 12, seed=1)
    rows = torch.cat([rows, gaussian(8, 12, seed=2)])
    turned = rows @ torch.linalg.qr(gaussian(12, 12, seed=3)).Q
    before, after = geometry(rows).compute(), geometry(turned).compute()
    assert before.pop("basis_alignment") > 5
    assert abs(after.pop("basis_alignment")) < 3.5
    assert_same(after, before, rel=1e-5)


def test_the_alignment_of_random_directions_is_about_standard_normal():
    scores = [
        geometry(gaussian(40, 10, seed=s), seed=s).compute()["basis_alignment"] for s in range(30)
    ]
    assert abs(sum(scores) / 30) < 0.6
    assert 0.5 < torch.tensor(scores).std() < 1.7


def test_rows_that_write_nothing_are_left_out():
    rows = gaussian(20, 6, seed=4)
    padded = torch.cat([rows, torch.zeros(3, 6)])
    assert geometry(padded).compute() == geometry(rows).compute()
    arrays = geometry(padded).arrays()
    for scores in arrays.values():
        assert scores.isnan().tolist() == [False] * 20 + [True] * 3
    assert all(isinstance(v, Undefined) for v in geometry(torch.zeros(3, 6)).compute().values())


def test_it_is_run_by_name_without_a_token_of_its_own():
    rows = unit(gaussian(20, 6, seed=5))
    x = activation_contexts([gaussian(30, 6, seed=6)])
    found = evaluate(Rows(rows), x, names=["geometry", "sparsity"])
    assert found.metrics["effective_rank"] == geometry(rows).compute()["effective_rank"]
    assert found.arrays["geometry/latents/largest_cosine"].shape == (20,)
    with pytest.raises(ValueError, match="geometry must be given the coder"):
        Geometry(EvalSetup(6, 20))
