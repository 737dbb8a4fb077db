"""Dictionaries with one planted defect each, on a finite world that is also a language model.

The world has ROWS rows with known features; token i of the toy language model has row i as its
activation at `place`, and the next token depends on it. So every eval can be fed the same rows: by
`evaluate_on_world`, or by `evaluate` with `lm`. A dictionary is a table of codes, one a row, and
decoder rows; `encode` looks the row up. That plants any code, also one that no encoder would give.

To cover a new eval that reads text: its name in TEXT_EVALS; then a line for each metric that judges
in docs/defects.md, as `test_defect_matrix` prints it. A new defect: a function here, a row in
DEFECTS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from toy_worlds import gaussian, unit

from sae.config import EvalConfig
from sae.evals import evaluate, evaluate_on_world
from sae.evals.interface import Value
from sae.evals.nulls import RandomDirections
from sae.stream.contexts import Contexts
from sae.stream.language_model import LanguageModel
from sae.worlds import Sample

ROWS, N_FEATURES, D_IN, D_SAE, L0 = 2048, 40, 24, 24, 4
N_CONTEXTS, CONTEXT = 64, 16
PARENTS, CHILDREN = (0, 1), (2, 3, 4, 5)
PAIRS = torch.tensor([[0, 2], [0, 3], [1, 4], [1, 5]])


class FiniteWorld:
    """Rows with known features: two parents with two children each, and independent others."""

    def __init__(self, seed: int = 0) -> None:
        self.n_features, self.d_in, self.seed = N_FEATURES, D_IN, seed
        self.directions = unit(gaussian(N_FEATURES, D_IN, seed=seed + 1))
        self.bias = 0.3 * gaussian(D_IN, seed=seed + 2)
        generator = torch.Generator().manual_seed(seed)
        self.codes = self._draw(generator)
        self.x = self.codes @ self.directions + self.bias
        self.x += 0.05 * torch.randn(ROWS, D_IN, generator=generator)

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """Draw n of the rows."""
        chosen = torch.randint(ROWS, (n,), generator=generator)
        return Sample(self.x[chosen], self.codes[chosen])

    def rows_of(self, x: Tensor) -> Tensor:
        """Return which rows x (n, d_in) are."""
        return torch.cdist(x.float(), self.x).argmin(1)

    @cached_property
    def lm(self) -> LanguageModel:
        """The world as a language model."""
        module: Any = ToyModel(self.x, gaussian(ROWS, D_IN, seed=self.seed + 3))
        return LanguageModel(module.eval().requires_grad_(False), SimpleNamespace(), "toy")  # type: ignore[arg-type]

    @cached_property
    def contexts(self) -> list[Contexts]:
        """Text in which each token is drawn from what the model expects."""
        generator = torch.Generator().manual_seed(self.seed + 4)
        tokens = torch.randint(ROWS, (N_CONTEXTS, CONTEXT), generator=generator)
        for t in range(1, CONTEXT):
            expected = self.lm.module(tokens[:, :t]).logits[:, -1].softmax(-1)
            tokens[:, t] = torch.multinomial(expected, 1, generator=generator)[:, 0]
        documents = torch.arange(N_CONTEXTS)[:, None].expand(-1, CONTEXT).contiguous()
        return [Contexts(tokens, documents, torch.ones_like(tokens, dtype=torch.bool))]

    def _draw(self, generator: torch.Generator) -> Tensor:
        rates = torch.linspace(0.16, 0.05, N_FEATURES)
        rates[list(PARENTS)] = 0.3
        fires = torch.rand(ROWS, N_FEATURES, generator=generator) < rates
        which = torch.rand(ROWS, len(PARENTS), generator=generator)
        for i, parent in enumerate(PARENTS):  # one child, the other, or none, where the parent is
            first, second = CHILDREN[2 * i : 2 * i + 2]
            fires[:, first] = fires[:, parent] & (which[:, i] < 0.35)
            fires[:, second] = fires[:, parent] & (which[:, i] > 0.65)
        sizes = 1 + torch.rand(ROWS, N_FEATURES, generator=generator)
        return torch.where(fires, sizes, 0.0)


class NoNorm(nn.Identity):
    """A final norm that does nothing."""


class ToyModel(nn.Module):
    """A token's activation is its row; the logits are linear in it."""

    def __init__(self, rows: Tensor, readout: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(rows)
        self.place, self.norm = nn.Identity(), NoNorm()
        self.head = nn.Linear(*readout.T.shape, bias=False)
        self.head.weight = nn.Parameter(readout)

    def get_output_embeddings(self) -> nn.Linear:
        """Return what makes the logits."""
        return self.head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Return an object with logits (b, t, vocabulary)."""
        return SimpleNamespace(logits=self.head(self.norm(self.place(self.embed(input_ids)))))


@dataclass
class Planted:
    """A dictionary given as a table: `table` (ROWS, m) codes, `W_dec` (m, d_in)."""

    world: FiniteWorld
    table: Tensor
    W_dec: Tensor

    def __post_init__(self) -> None:
        self.d_sae, self.d_in = self.W_dec.shape

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of the rows x."""
        return self.table[self.world.rows_of(x)]

    def decode(self, dense: Tensor) -> Tensor:
        """Return x_hat."""
        return dense @ self.W_dec + self.world.bias


def oracle(world: FiniteWorld) -> Planted:
    """The D_SAE most frequent features with their true codes."""
    chosen = (world.codes > 0).sum(0).argsort(descending=True, stable=True)[:D_SAE]
    return Planted(world, world.codes[:, chosen], world.directions[chosen])


def random(world: FiniteWorld) -> Any:
    """Random directions at the oracle's L0."""
    return RandomDirections(world.bias, D_SAE, L0, seed=7)


def pca(world: FiniteWorld) -> Planted:
    """The principal components, the L0 largest of each row."""
    components = torch.linalg.svd(world.x - world.x.mean(0), full_matrices=False).Vh[:D_SAE]
    return Planted(world, _largest((world.x - world.bias) @ components.T), components)


def identity(world: FiniteWorld) -> Planted:
    """The axes, the L0 largest of each row."""
    return Planted(world, _largest(world.x - world.bias), torch.eye(D_IN))


def permuted_decoder(world: FiniteWorld) -> Planted:
    """The oracle, whose latents write one another's directions."""
    whole = oracle(world)
    return Planted(world, whole.table, whole.W_dec.roll(1, 0))


def shuffled_codes(world: FiniteWorld) -> Planted:
    """The oracle with another row's code at each row."""
    whole = oracle(world)
    return Planted(world, whole.table.roll(ROWS // 2, 0), whole.W_dec)


def absorption(world: FiniteWorld) -> Planted:
    """The oracle, whose parents are silent where a child fires and writes them too."""
    whole, at = oracle(world), _latents_of(world)
    table, rows = whole.table.clone(), whole.W_dec.clone()
    for parent, child in PAIRS.tolist():
        p, c = at[parent], at[child]
        table[world.codes[:, child] > 0, p] = 0
        rows[c] = unit((whole.W_dec[c] + whole.W_dec[p])[None])[0]
        table[:, c] *= (whole.W_dec[c] + whole.W_dec[p]).norm()
    return Planted(world, table, rows)


def splitting(world: FiniteWorld) -> Planted:
    """The oracle, whose latents outside the families come twice, each for every second row."""
    whole = oracle(world)
    split = [k for k in range(D_SAE) if k not in _latents_of(world).values()]
    table = torch.cat([whole.table, whole.table[:, split]], 1)
    table[::2, split] = 0
    table[1::2, D_SAE:] = 0
    return Planted(world, table, torch.cat([whole.W_dec, whole.W_dec[split]]))


def noise_fitting(world: FiniteWorld) -> Planted:
    """The oracle's directions, with the sizes that fit each row best, whatever the true ones."""
    whole = oracle(world)
    table = torch.zeros_like(whole.table)
    for i, row in enumerate(world.x - world.bias):
        on = whole.table[i].nonzero()[:, 0]
        if len(on):
            table[i, on] = torch.linalg.lstsq(whole.W_dec[on].T, row[:, None]).solution[:, 0]
    return Planted(world, table, whole.W_dec)


def half_dead(world: FiniteWorld) -> Planted:
    """The oracle, of which every second latent never fires."""
    whole = oracle(world)
    table = whole.table.clone()
    table[:, ::2] = 0
    return Planted(world, table, whole.W_dec)


DEFECTS: Mapping[str, Callable[[FiniteWorld], Any]] = {
    "random": random,
    "pca": pca,
    "identity": identity,
    "permuted decoder": permuted_decoder,
    "shuffled codes": shuffled_codes,
    "absorption": absorption,
    "splitting": splitting,
    "noise fitting": noise_fitting,
    "half dead": half_dead,
}


def measure(coder: Any, world: FiniteWorld) -> dict[str, Value]:
    """Return every metric of every eval, `EVAL/METRIC`."""
    found = evaluate_on_world(
        coder,
        world,  # type: ignore[arg-type]
        4096,
        names=["full"],
        pairs=PAIRS,
        n_resamples=2,
        settings=EvalConfig(probe_features=8),
    )
    on_text = evaluate(
        coder, world.contexts, lm=world.lm, hookpoint="place", names=TEXT_EVALS, n_resamples=2
    )
    return {
        f"{name}/{metric}": value
        for results in (found, on_text)
        for name, record in results.evals.items()
        for metric in record.metrics
        if not metric.endswith(("/low", "/high"))
        for value in [results.metrics[metric]]
    }


TEXT_EVALS = ("downstream", "interventions")


def _latents_of(world: FiniteWorld) -> dict[int, int]:
    """Return which latent of the oracle each feature of the families is."""
    chosen = (world.codes > 0).sum(0).argsort(descending=True, stable=True)[:D_SAE].tolist()
    return {feature: chosen.index(feature) for feature in (*PARENTS, *CHILDREN)}


def _largest(codes: Tensor) -> Tensor:
    kept = codes.abs().topk(L0).indices
    return torch.zeros_like(codes).scatter(1, kept, codes.gather(1, kept))
