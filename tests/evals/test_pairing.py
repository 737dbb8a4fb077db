"""Differences between dictionaries on the same documents, and what may not be compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae.coder import SparseCoder
from sae.config import CoderConfig
from sae.evals import activation_contexts, evaluate, read_results, write_results
from sae.evals.interface import Undefined
from sae.evals.pairing import difference, require_comparable
from sae.evals.results import EvalResults

D, N = 16, 600


def rows(seed: int = 0) -> Tensor:
    """Documents of ten rows each, some hard (large and noisy) for any dictionary."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator)
    hardness = torch.rand(N // 10, generator=generator).repeat_interleave(10)
    return x * (0.2 + 3 * hardness[:, None])


def documents() -> Tensor:
    return torch.arange(N // 10).repeat_interleave(10)


def coder(k: int, seed: int = 0) -> SparseCoder:
    return SparseCoder.create(D, CoderConfig(d_sae=64, k=k), seed=seed)


def measured(k: int, x: Tensor | None = None, **options) -> EvalResults:
    given = activation_contexts([rows() if x is None else x], [documents()])
    return evaluate(coder(k), given, n_resamples=500, **options)


@pytest.fixture(scope="module")
def pair() -> tuple[EvalResults, EvalResults]:
    return measured(4), measured(5)


def test_a_paired_difference_is_that_of_both_on_the_same_resamples(pair):
    one, other = pair
    found = difference(one, other, "fvu")
    assert found is not None
    assert found.value == pytest.approx(one.metrics["fvu"] - other.metrics["fvu"])
    draws = one.arrays["draws/fvu"] - other.arrays["draws/fvu"]
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert (found.low, found.high) == (pytest.approx(float(low)), pytest.approx(float(high)))
    assert found.low < found.value < found.high


def test_pairing_takes_away_what_documents_have_in_common(pair):
    """Of one dictionary and a slightly better one the intervals overlap; their difference's does
    not reach 0."""
    one, other = pair
    assert one.metrics["mse/low"] < other.metrics["mse/high"]
    found = difference(one, other, "mse")
    assert found is not None
    assert found.is_clear
    width = one.metrics["mse/high"] - one.metrics["mse/low"]
    assert found.high - found.low < width / 2


def test_a_dictionary_does_not_differ_from_itself(pair):
    found = difference(pair[0], pair[0], "fvu")
    assert found == (0, 0, 0)
    assert not found.is_clear


def test_metrics_without_an_interval_over_documents_have_bare_differences(pair):
    found = difference(*pair, "dead")
    assert found is not None
    assert isinstance(found.low, Undefined)
    assert not found.is_clear
    assert difference(*pair, "rate_under_1e-6") is None


def test_draws_of_other_documents_are_not_paired(pair):
    one, other = pair
    present = other.arrays["drawn_from/fvu"].clone()
    present[0] = False
    moved = replace(other, arrays={**other.arrays, "drawn_from/fvu": present})
    found = difference(one, moved, "fvu")
    assert found is not None
    assert found.low == Undefined("it was taken from other documents in each")


def test_draws_survive_the_file(pair, tmp_path):
    for i, results in enumerate(pair):
        write_results(results, tmp_path / f"{i}.json")
    again = [read_results(tmp_path / f"{i}.json") for i in range(2)]
    assert difference(*again, "fvu") == difference(*pair, "fvu")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed 0 and 1"),
        ({"x": rows(seed=1)}, "digest of the tokens"),
        ({"tokens": 500}, "number of tokens 600 and 500"),
        ({"max_norm": 5.0}, "largest norm None and 5.0"),
    ],
)
def test_results_of_other_tokens_or_seeds_are_refused_by_name(pair, options, named):
    with pytest.raises(ValueError, match=f"a and b differ in: .*{named}"):
        require_comparable({"a": pair[0], "b": measured(5, **options)})


def test_results_of_another_model_are_refused(pair):
    one, other = pair
    provenance = {**other.provenance, "model": "another", "reinitialised": 7}
    with pytest.raises(ValueError, match="model None and 'another'; seed of the model's weights"):
        require_comparable({"a": one, "b": replace(other, provenance=provenance)})
    old = {key: value for key, value in other.provenance.items() if key != "evaluated"}
    with pytest.raises(ValueError, match="those of b are of a version that did not"):
        require_comparable({"a": one, "b": replace(other, provenance=old)})


def test_the_digest_of_tokens_is_that_of_any_batches_and_order(pair):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    x, ids = rows()[order], documents()[order]
    shuffled = activation_contexts([x[:100], x[100:]], [ids[:100], ids[100:]])
    found = evaluate(coder(4), shuffled, n_resamples=2)
    assert found.provenance["evaluated"] == pair[0].provenance["evaluated"]
    moved = x.clone()
    moved[0, 0] += 1e-3
    other = evaluate(coder(4), activation_contexts([moved], [ids]), n_resamples=2)
    assert other.provenance["evaluated"] != pair[0].provenance["evaluated"]


def test_the_digest_of_a_dictionary_is_of_its_weights_and_settings(pair):
    digests = {measured(k, names=["sparsity"]).provenance["dictionary"] for k in (4, 4, 5)}
    assert len(digests) == 2
    other = evaluate(coder(4, seed=1), activation_contexts([rows()]), names=["sparsity"])
    assert other.provenance["dictionary"] not in digests
    assert pair[0].provenance["dictionary"] in digests
