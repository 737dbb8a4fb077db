"""Evaluating on a world: the order of the nulls, and `sae eval` on a run that trained on one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from toy_worlds import Linear, ToyWorld, gaussian, unit

from sae.cli import main
from sae.evals import EVALS, activation_contexts, evaluate, evaluate_on_world
from sae.evals.evaluable import Evaluable
from sae.evals.nulls import RandomDirections, ShuffledCodes, TrueDictionary
from sae.evals.on_world import family_pairs, frequent_features

N = 3000
WITHOUT_TEXT = {
    name
    for name, row in EVALS.items()
    if row.reads in ("weights", "activations", "world") and row.cost != "minutes"
}


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.fixture(scope="module")
def metrics(world: ToyWorld) -> dict[str, dict]:
    top = frequent_features(world, 12)
    near = unit(world.directions[top] + 0.1 * gaussian(12, 16, seed=5))
    trained = Linear(world, near, near)
    coders = {
        "truth": TrueDictionary(world, top),
        "trained": trained,
        "random": RandomDirections(world.bias, 12, 4),
        "shuffled": ShuffledCodes(trained, 12),
        "truth, shuffled": ShuffledCodes(TrueDictionary(world, top), 12),
        "permuted": Linear(world, near, near.roll(1, 0)),
    }
    return {
        name: dict(evaluate_on_world(coder, world, N, n_resamples=20).metrics)
        for name, coder in coders.items()
    }


def test_the_truth_is_perfect(metrics):
    truth = metrics["truth"]
    for name in ("f1", "precision", "recall", "f1_act", "mcc", "uniqueness", "recovered_0.9"):
        assert truth[name] == pytest.approx(1, abs=1e-6), name
    assert truth["code_mcc"] == pytest.approx(1)
    assert truth["magnitude_r2"] == pytest.approx(1)
    assert truth["ev_minus_oracle"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("f1", ("truth", "trained", "random")),
        ("f1", ("trained", "shuffled")),
        ("f1", ("trained", "permuted")),
        ("f1", ("truth", "truth, shuffled")),
        ("f1_act", ("truth", "trained", "random")),
        ("f1_act", ("trained", "shuffled")),
        ("code_mcc", ("truth", "trained", "random", "shuffled")),
        ("mcc", ("truth", "trained", "random")),
        ("recovered_0.9", ("truth", "random")),
        ("magnitude_r2", ("truth", "trained", "shuffled")),
        ("ev_minus_oracle", ("truth", "trained", "random", "shuffled")),
    ],
)
def test_the_order_that_each_claims_to_see(metrics, name, order):
    for better, worse in pairwise(order):
        assert metrics[better][name] > metrics[worse][name] + 0.02, (better, worse)


def test_what_each_cannot_see(metrics):
    trained, shuffled, permuted = (metrics[k] for k in ("trained", "shuffled", "permuted"))
    for name in ("mcc", "mmcs_latents", "uniqueness"):
        assert shuffled[name] == trained[name]
    for name in ("f1_act", "code_mcc"):
        assert permuted[name] == trained[name]


def test_rows_are_those_of_the_seed_and_the_metrics_of_all_evals_are_there(world):
    coder = RandomDirections(world.bias, 12, 4)
    found = [evaluate_on_world(coder, world, 1500, seed=s, n_resamples=5) for s in (0, 0, 1)]
    assert found[0].metrics == found[1].metrics
    assert found[0].metrics["f1"] != found[2].metrics["f1"]
    assert set(found[0].evals) == WITHOUT_TEXT
    assert found[0].evals["ground_truth"].n_tokens == 1500
    assert found[0].provenance["l0"] == found[0].metrics["l0"]


def test_a_parent_is_found_by_its_own_latent():
    tree = ToyWorld(is_tree=True)
    pairs = torch.tensor([[0, 2], [0, 3], [1, 4], [1, 5]])
    coder = TrueDictionary(tree, torch.arange(24))
    found = evaluate_on_world(coder, tree, N, pairs=pairs, n_resamples=5).metrics
    assert found["parent_recall_child_on"] == found["parent_recall_child_off"] == 1
    assert family_pairs(tree).shape == (0, 2)


class Sparse:
    """A coder that shows no decoder rows and takes sparse codes alone."""

    def __init__(self, inner: RandomDirections) -> None:
        self._inner, self.d_sae = inner, inner.d_sae
        self.encode_sparse, self.decode = inner.encode_sparse, inner.decode


def test_directions_of_a_coder_that_names_none(world):
    inner = RandomDirections(world.bias, 12, 4)
    found = Evaluable(Sparse(inner), 16).directions()
    assert torch.allclose(found, inner.W_dec, atol=1e-6)


def test_what_cannot_run_is_refused(world):
    coder = RandomDirections(world.bias, 12, 4)
    with pytest.raises(ValueError, match="a world has none"):
        evaluate_on_world(coder, world, 10, names=["downstream"])
    with pytest.raises(ValueError, match="at least 1"):
        evaluate_on_world(coder, world, 0)
    with pytest.raises(ValueError, match="evaluate_on_world"):
        evaluate(coder, activation_contexts([torch.zeros(4, 16)]), names=["ground_truth"])
    with pytest.raises(RuntimeError, match="true codes"):
        TrueDictionary(world, torch.arange(3)).encode(torch.zeros(4, 16))


@pytest.fixture(scope="module")
def world_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tree = {
        "world": {"name": "synth_1k", "n_features": 32, "d_in": 16, "trees": 2, "branching": 2},
        "coder": {"d_sae": 16, "k": 3},
        "train": {"tokens": 8192, "batch_tokens": 256},
        "eval": {"tokens": 2000},
        "run": {"device": "cpu"},
    }
    (folder / "world.yaml").write_text(yaml.safe_dump(tree))
    main(["train", str(folder / "world.yaml"), "--run.folder", str(folder / "run")])
    return folder / "run"


def test_eval_of_a_run_on_a_world(world_run: Path, capsys: pytest.CaptureFixture):
    main(["eval", str(world_run)])
    results = json.loads((world_run / "results.json").read_text())
    assert set(results["evals"]) == WITHOUT_TEXT
    assert results["provenance"]["world"]["n_features"] == 32
    assert 0 < results["metrics"]["f1"] <= 1
    assert 0 < results["metrics"]["pairs_detected"] <= 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "world synth_1k: 2,000 held-out samples" in printed
    assert EVALS["ground_truth"].labels["f1"].text in printed
    for name in {name for name in results["metrics"] if "/" not in name}:
        assert name in {metric for e in results["evals"].values() for metric in e["metrics"]}


def test_a_dictionary_knows_its_world(world_run: Path):
    out = world_run / "again.json"
    main(["eval", str(world_run)])
    main(["eval", str(world_run / "final"), "--eval.tokens", "2000", "--out", str(out)])
    again, first = (json.loads(path.read_text()) for path in (out, world_run / "results.json"))
    assert again["metrics"] == first["metrics"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "{run}"], "which has neither"),
        (["eval", "{run}", "--evals", "downstream"], "a world has none"),
    ],
)
def test_what_a_world_does_not_have(
    world_run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit):
        main([word.replace("{run}", str(world_run)) for word in words])
    assert message in " ".join(capsys.readouterr().err.split())
