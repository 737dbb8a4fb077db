"""Null dictionaries: what each keeps and destroys, how they stand beside a dictionary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_worlds import Linear, ToyWorld, gaussian, unit

from sae.cli import main
from sae.coder import SparseCoder
from sae.coder.latents import Latents
from sae.config import CoderConfig, EvalConfig
from sae.evals import (
    activation_contexts,
    evaluate,
    evaluate_on_world,
    read_results,
    rotation,
    table_rows,
    write_results,
)
from sae.evals.evaluable import Evaluable
from sae.evals.inputs import pieces_of
from sae.evals.interface import Label
from sae.evals.null_rows import NULLS, checked_nulls, evals_of_nulls, short_name
from sae.evals.nulls import (
    Directions,
    PermutedDecoder,
    ShuffledCodes,
    budget,
    principal_components,
    random_directions,
)
from sae.evals.results import EvalResults, NullResult
from sae.evals.rotation import Rotation
from sae.evals.scale import scale_of
from sae.evals.truth import frequent_features
from sae.stream.contexts import CapturedContexts

N, D, M = 3000, 16, 12
MADE = [name for name, row in NULLS.items() if row.make is not None]


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.fixture(scope="module")
def trained(world: Any) -> Linear:
    near = unit(world.directions[frequent_features(world, M)] + 0.1 * gaussian(M, D, seed=5))
    return Linear(world, near, near)


@pytest.fixture(scope="module")
def found(world: Any, trained: Linear) -> EvalResults:
    return evaluate_on_world(trained, world, N, n_resamples=20, nulls=MADE)


def numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}


def numbered(n: int, t: int, seed: int = 0) -> tuple[CapturedContexts, Latents]:
    """n contexts of t tokens, some masked; the code of a token is its number among those kept."""
    tokens = torch.arange(n * t).reshape(n, t)
    is_kept = torch.rand(n, t, generator=torch.Generator().manual_seed(seed)) < 0.8
    kept = int(is_kept.sum())
    contexts = CapturedContexts(tokens, tokens // t, is_kept, tokens[..., None].float())
    return contexts, Latents(torch.arange(1.0, kept + 1)[:, None], torch.zeros(kept, 1).long())


def turned(contexts: CapturedContexts, latents: Latents, size: int) -> dict[int, float]:
    """By token, the code that a rotation gives it, in batches of `size` contexts."""
    rotating, given_codes, start = Rotation(), {}, 0
    pieces = []
    for piece in pieces_of(contexts, size):
        end = start + int(piece.is_kept.sum())
        code = Latents(latents.values[start:end], latents.indices[start:end])
        pieces += rotating.add(piece, code)
        start = end
    for piece, code in [*pieces, *rotating.finish()]:
        tokens = piece.tokens[piece.is_kept].tolist()
        given_codes |= dict(zip(tokens, code.values[:, 0].tolist(), strict=True))
    return given_codes


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 11), lag=st.integers(1, 60))
def test_a_rotation_is_one_permutation_whatever_the_batches(n: int, size: int, lag: int):
    contexts, latents = numbered(n, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "LAG_TOKENS", lag)
        codes = turned(contexts, latents, size)
        whole = turned(contexts, latents, n)
    own = dict(
        zip(contexts.tokens[contexts.is_kept].tolist(), latents.values[:, 0].tolist(), strict=True)
    )
    assert codes == whole
    assert sorted(codes.values()) == sorted(own.values())
    total = len(own)
    steps = {(codes[token] - own[token]) % total for token in own}
    assert len(steps) <= 1  # one turn of the whole circle
    assert all(min(step, total - step) >= min(lag, total // 2) for step in steps)


def test_shuffled_and_permuted_keep_l0_and_every_rate(world, trained, found):
    for name in ("shuffled", "permuted"):
        null = found.nulls[name].metrics
        for metric in ("l0", "l0_sd", "l0_p99", "dead", "dense"):
            assert null[metric] == found.metrics[metric], (name, metric)
    rows = ShuffledCodes(trained)
    x = world.sample(200, torch.Generator().manual_seed(1)).x
    own, other = (
        code.to_dense(M) for code in (Evaluable(trained, D).code_of(x), rows.encode_sparse(x))
    )
    assert torch.equal(own.sort(0).values, other.sort(0).values)
    assert not torch.equal(own, other)


@pytest.mark.parametrize("l0", [0.0, 0.6, 2.0, 3.4, 7.9])
@pytest.mark.parametrize("is_signed", [False, True])
def test_fixed_directions_have_the_l0_that_was_asked_for(l0: float, is_signed: bool):
    x = gaussian(4000, D, seed=3) + 5
    for rows in (random_directions(24, D, 0), principal_components(x, 24), torch.eye(D)):
        null = Directions.at_l0(rows, x, l0, is_signed=is_signed)
        codes = null.encode_sparse(gaussian(4000, D, seed=4) + 5)
        assert codes.l0().double().mean() == pytest.approx(l0, abs=0.1)
        assert is_signed or bool((codes.values >= 0).all())


def test_a_budget_stops_at_what_there_is():
    scores = torch.tensor([[1.0, -1.0, -1.0], [2.0, 1.0, -3.0]])
    assert budget(scores, 9.0) == (3, 0.0)
    assert budget(scores, 1.0) == (1, 0.0)
    assert budget(scores, 1.5) == (2, -0.0)


def test_permuted_latents_write_anothers_row_with_their_own_code(world, trained):
    null = PermutedDecoder(trained, seed=2)
    x = world.sample(50, torch.Generator().manual_seed(1)).x
    code = null.encode_sparse(x)
    assert torch.equal(code.to_dense(M), Evaluable(trained, D).code_of(x).to_dense(M))
    assert sorted(null.writes.tolist()) == list(range(M))
    assert not (null.writes == torch.arange(M)).any()
    expected = code.to_dense(M) @ null.W_dec + world.bias
    torch.testing.assert_close(null.decode(code), expected)
    torch.testing.assert_close(null.W_dec, trained.W_dec[null.writes])


@pytest.mark.parametrize(
    ("metric", "order"),
    [
        ("f1", ("oracle", "", "random")),
        ("f1", ("", "shuffled")),
        ("f1", ("", "permuted")),
        ("f1_act", ("oracle", "", "random", "shuffled")),
        ("code_mcc", ("oracle", "", "random", "shuffled")),
        ("mcc", ("oracle", "", "random")),
        ("ev_minus_oracle", ("", "random", "permuted", "shuffled")),
        ("tpp_1", ("oracle", "", "random", "shuffled")),
    ],
)
def test_the_order_that_each_claims_to_see(found, metric, order):
    values = {name: null.metrics[metric] for name, null in found.nulls.items()}
    values[""] = found.metrics[metric]
    for better, worse in pairwise(order):
        assert values[better] > values[worse] + 0.02, (better, worse)


def test_the_oracle_is_perfect_and_nulls_say_what_they_are(found):
    for metric in ("f1", "mcc", "code_mcc", "uniqueness"):
        assert found.nulls["oracle"].metrics[metric] == pytest.approx(1, abs=1e-6)
    assert {name: null.destroys for name, null in found.nulls.items()} == {
        name: NULLS[name].destroys for name in MADE
    }
    assert found.nulls["pca"].d_sae == M
    assert found.nulls["identity"].d_sae == D
    assert found.nulls["random"].l0 == pytest.approx(found.provenance["l0"], abs=0.05)


def test_scores_of_the_dictionary_are_those_without_nulls(world, trained, found):
    alone = evaluate_on_world(trained, world, N, n_resamples=20)
    assert alone.metrics == found.metrics
    assert alone.nulls == {}


def test_the_share_of_the_way():
    def results(shuffled: float | None, oracle: float | None = None) -> EvalResults:
        scores = {"shuffled": shuffled, "oracle": oracle}
        nulls = {
            name: NullResult({"m": value}, {}, 1.0, 1, "", "", "")
            for name, value in scores.items()
            if value is not None
        }
        return EvalResults({}, {}, {}, {}, {}, nulls=nulls)

    up, down = Label("m", better="higher", best=1), Label("m", better="lower", best=0)
    share = scale_of("m", up, results(0.5))
    assert share is not None
    assert share.share(0.8) == pytest.approx(0.6)
    share = scale_of("m", up, results(0.0, 0.5))
    assert share is not None
    assert (share.share(0.4), share.is_truth) == (pytest.approx(0.8), True)
    share = scale_of("m", down, results(2.0))
    assert share is not None
    assert share.share(0.5) == pytest.approx(0.75)
    assert scale_of("m", up, results(None, 0.5)) is None
    assert scale_of("m", Label("m"), results(0.5)) is None
    assert scale_of("m", up, results(1.0)) is None
    assert scale_of("m", up._replace(is_below_truth=False), results(0.0, 0.5)) is None
    assert scale_of("m", Label("m", better="higher"), results(0.0)) is None


def test_the_table_has_a_column_for_each_null_and_the_share(found):
    rows = {row.metric: row for row in table_rows(found)}
    assert all(len(row.nulls) == len(found.nulls) for row in rows.values())
    place = list(found.nulls).index("shuffled")
    assert float(rows["f1"].nulls[place]) == pytest.approx(
        found.nulls["shuffled"].metrics["f1"], abs=6e-4
    )
    shuffled = found.nulls["shuffled"].metrics["f1"]
    expected = (found.metrics["f1"] - shuffled) / (1 - shuffled)
    assert float(rows["f1"].share) == pytest.approx(expected, abs=6e-3)
    assert rows["mcc"].share == "0.00"
    assert rows["tpp_1"].share == ""  # the truth does not bound it


def test_results_with_nulls_survive_the_file(found, tmp_path: Path):
    write_results(found, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json").nulls == found.nulls
    content = json.loads((tmp_path / "results.json").read_text())
    assert set(content["nulls"]) == set(MADE)
    for null in content["nulls"].values():
        del null["seconds"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert read_results(tmp_path / "results.json").nulls["pca"].seconds is None
    del content["nulls"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert read_results(tmp_path / "results.json").nulls == {}


def test_names_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"got 'shufled'. Did you mean 'shuffled'\?"):
        checked_nulls(["shufled"])
    with pytest.raises(ValueError, match=r"must be trained.*--train.freeze_decoder"):
        checked_nulls(["frozen"])
    coder = SparseCoder.create(D, CoderConfig(d_sae=32, k=4))
    x = gaussian(300, D, seed=0)
    with pytest.raises(ValueError, match="must have a world"):
        evaluate(coder, activation_contexts([x]), nulls=["oracle"])


def test_what_is_dear_is_not_multiplied_by_nulls():
    names = ("sparsity", "autointerp", "interventions")
    kept, left_out = evals_of_nulls(names, EvalConfig())
    assert kept == ("sparsity", "autointerp")
    assert set(left_out) == {"interventions"}
    kept, left_out = evals_of_nulls(names, EvalConfig(judge="endpoint"))
    assert kept == ("sparsity",)
    assert "its judge is a model" in left_out["autointerp"]


def test_names_of_paths():
    assert short_name("runs/frozen", []) == "frozen"
    assert short_name("runs/frozen/final", []) == "frozen"
    assert short_name("runs/a", ["a"]) == "runs/a"
    assert short_name("elsewhere/shuffled", []) == "elsewhere/shuffled"


def test_nulls_of_text_are_measured_in_the_same_passes(lm, hookpoint, contexts):
    """Whatever the batches; and what each finds is what it finds alone, but for the shuffling."""
    coder = SparseCoder.create(32, CoderConfig(d_sae=64, k=8))
    names = ("reconstruction", "sparsity", "downstream", "autointerp")
    nulls = ("shuffled", "permuted", "random", "pca", "identity")

    def measured(batches, coder: Any = coder, **more) -> EvalResults:
        return evaluate(
            coder,
            batches,
            lm=lm,
            hookpoint=hookpoint,
            names=names,
            n_resamples=2,
            settings=EvalConfig(judge_latents=3, judge_examples=4),
            **more,
        )

    whole = measured([contexts], nulls=nulls)
    parts = measured(pieces_of(contexts, 5), nulls=nulls)
    for name, null in whole.nulls.items():
        for metric, value in null.metrics.items():
            other = parts.nulls[name].metrics[metric]
            same = other if value is None else pytest.approx(value, rel=1e-4, abs=1e-4)
            assert other == same, (name, metric)
    assert whole.metrics == measured([contexts]).metrics
    alone = measured([contexts], PermutedDecoder(coder, seed=0)).metrics
    assert numbers(whole.nulls["permuted"].metrics) == pytest.approx(numbers(alone), rel=1e-5)
    shuffled, own = whole.nulls["shuffled"].metrics, whole.metrics
    assert (shuffled["l0"], shuffled["dead"]) == (own["l0"], own["dead"])
    assert numbers(shuffled)["fvu"] > numbers(own)["fvu"]
    assert shuffled["ce_clean"] == own["ce_clean"]
    assert shuffled["kl"] != own["kl"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_run_tree: dict[str, dict]) -> Path:
    """A run and its nulls: a frozen decoder, a re-initialised model, another width and place."""
    folder = tmp_path_factory.mktemp("nulls")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_run_tree))
    for name, flags in {
        "trained": (),
        "frozen": ("--train.freeze_decoder", "--train.step", "autograd"),
        "reinitialised": ("--model.reinitialised", "7"),
        "wide": ("--coder.d_sae", "128"),
        "elsewhere": ("--model.hookpoint", "model.layers.2"),
    }.items():
        words = [str(folder / "tiny.yaml"), "--run.folder", str(folder / name)]
        main(["train", *words, "--train.tokens", "1280", *flags])
    return folder


def test_eval_with_nulls_from_end_to_end(runs: Path, capsys: pytest.CaptureFixture):
    twins = [str(runs / "frozen"), str(runs / "reinitialised" / "final")]
    nulls = ",".join(["shuffled", "random", *twins])
    main(["eval", str(runs / "trained"), "--nulls", nulls, "--evals", "reconstruction,downstream"])
    shown = capsys.readouterr().out
    found = read_results(runs / "trained" / "results.json")
    assert set(found.nulls) == {"shuffled", "random", "frozen", "reinitialised"}
    for name in found.nulls:
        assert name in shown
    assert "of the way" in shown
    assert "nulls took " in shown
    assert all(null.seconds and null.seconds > 0 for null in found.nulls.values())
    clean = {name: null.metrics["ce_clean"] for name, null in found.nulls.items()}
    assert clean["frozen"] == clean["shuffled"] == found.metrics["ce_clean"]
    assert clean["reinitialised"] != clean["frozen"]  # it is read from its own model
    assert numbers(found.metrics)["fvu"] < numbers(found.nulls["shuffled"].metrics)["fvu"]
    main(["eval", str(runs / "frozen"), "--evals", "reconstruction"])
    alone = read_results(runs / "frozen" / "results.json")
    assert found.nulls["frozen"].metrics["fvu"] == pytest.approx(alone.metrics["fvu"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "said"), [("wide", "d_sae"), ("elsewhere", "hookpoint"), ("no_such_run", "one of")]
)
def test_a_null_of_another_kind_is_refused_before_work(
    runs: Path, name: str, said: str, capsys, monkeypatch: pytest.MonkeyPatch
):
    from sae.evals import held_out

    monkeypatch.setattr(held_out, "open_model", lambda *_: pytest.fail("the model was opened"))
    with pytest.raises(SystemExit):
        main(["eval", str(runs / "trained"), "--nulls", str(runs / name)])
    assert said in capsys.readouterr().err


def test_a_world_has_twins_and_an_oracle(tmp_path: Path):
    tree = {
        "world": {"name": "matryoshka_toy"},
        "coder": {"d_sae": 20, "k": 2},
        "train": {"tokens": 6400, "batch_tokens": 64, "lr": 0.01, "step": "autograd"},
        "eval": {"tokens": 512, "nulls": ["oracle", "shuffled", str(tmp_path / "frozen")]},
    }
    (tmp_path / "world.yaml").write_text(yaml.safe_dump(tree))
    base = ["train", str(tmp_path / "world.yaml"), "--run.folder"]
    main([*base, str(tmp_path / "frozen"), "--train.freeze_decoder"])
    main([*base, str(tmp_path / "trained")])
    main(["eval", str(tmp_path / "trained"), "--evals", "ground_truth"])
    found = read_results(tmp_path / "trained" / "results.json")
    f1 = {name: numbers(null.metrics)["f1"] for name, null in found.nulls.items()}
    own = numbers(found.metrics)["f1"]
    assert f1["oracle"] == 1
    assert f1["oracle"] > own > f1["frozen"]
    assert own > f1["shuffled"]


def test_what_cannot_be_of_two_places_is_refused():
    from sae.coder.sites import Sites

    cfg = CoderConfig(d_sae=32, k=4, site="transcoder")
    coder = SparseCoder.create(D, cfg, sites=Sites((D,), (D,)))
    rows = gaussian(300, 2 * D, seed=0)
    for null in ("random", "pca", "identity"):
        with pytest.raises(ValueError, match="writes what it reads"):
            evaluate(coder, activation_contexts([rows]), nulls=[null])
    found = evaluate(coder, activation_contexts([rows]), nulls=["shuffled", "permuted"])
    assert found.nulls["shuffled"].l0 == found.nulls["permuted"].l0 == found.provenance["l0"]


def test_a_twin_of_another_width_is_refused_before_a_batch():
    coder = SparseCoder.create(D, CoderConfig(d_sae=32, k=4))
    other = SparseCoder.create(2 * D, CoderConfig(d_sae=32, k=4))

    def batches():
        yield from activation_contexts([gaussian(100, D, seed=0)])
        raise AssertionError("a second batch was read")

    with pytest.raises(ValueError, match="d_in=32, width 16"):
        evaluate(coder, batches(), twins={"other": other})
