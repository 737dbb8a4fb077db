"""Reconstruction orders dictionaries on data whose truth is known, as it claims to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sae.evals import activation_contexts, evaluate

D_IN, D_SAE, K, N = 24, 64, 4, 3000


@dataclass
class Fixed:
    """A dictionary whose code was made beforehand, in the order of the data."""

    code: Tensor
    directions: Tensor

    def __post_init__(self) -> None:
        self.d_in, self.d_sae, self.n_done = D_IN, D_SAE, 0

    def encode(self, x: Tensor) -> Tensor:
        start, self.n_done = self.n_done, self.n_done + len(x)
        return self.code[start : self.n_done]

    def decode(self, dense: Tensor) -> Tensor:
        return dense @ self.directions


def unit_rows(generator: torch.Generator) -> Tensor:
    rows = torch.randn(D_SAE, D_IN, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def best_code(x: Tensor, directions: Tensor) -> Tensor:
    """The least-squares code on the K directions that fit each x best alone."""
    chosen = torch.topk((x @ directions.T).abs(), K).indices
    fits = torch.linalg.lstsq(directions[chosen].mT, x[..., None]).solution[..., 0]
    return torch.zeros(len(x), D_SAE).scatter_(1, chosen, fits)


def test_truth_beats_noisy_beats_random_beats_shuffled():
    generator = torch.Generator().manual_seed(0)
    truth = unit_rows(generator)
    fires = torch.rand(N, D_SAE, generator=generator) < K / D_SAE
    code = torch.where(fires, 1 + torch.rand(N, D_SAE, generator=generator), 0.0)
    x = code @ truth + 0.05 * torch.randn(N, D_IN, generator=generator)
    noisy = truth + 0.1 * torch.randn(D_SAE, D_IN, generator=generator)
    random = unit_rows(generator)
    shuffled = code[torch.randperm(N, generator=generator)]
    dictionaries = {
        "truth": Fixed(code, truth),
        "noisy": Fixed(code, noisy),
        "random": Fixed(best_code(x, random), random),
        "shuffled": Fixed(shuffled, truth),
    }
    found = {
        name: evaluate(coder, activation_contexts([x]), names=["reconstruction"], n_resamples=200)
        for name, coder in dictionaries.items()
    }
    order = [(r.metrics["fvu/low"], r.metrics["fvu/high"]) for r in found.values()]
    for (_, better), (worse, _) in pairwise(order):
        assert better < worse
    assert found["truth"].metrics["fvu"] < 0.05
    assert found["shuffled"].metrics["fvu"] > 1
