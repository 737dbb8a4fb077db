"""An evaluation that was cut off goes on; what changed is run again, and said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sae.coder import SparseCoder
from sae.config import CoderConfig, Config
from sae.configuration import from_flat
from sae.evals import EVALS, read_results, write_results
from sae.evals.held_out import documents_of, evaluate_held_out
from sae.evals.ranks import Ranks
from sae.evals.resuming import NOTHING, finished_before


@pytest.fixture
def cfg(tiny_run_tree: dict[str, dict]) -> Config:
    flat = {
        f"{part}.{key}": v for part, values in tiny_run_tree.items() for key, v in values.items()
    }
    flat |= {"eval.tokens": 600, "eval.downstream_tokens": 200, "eval.judge_latents": 4}
    return from_flat(flat)


@pytest.fixture
def coder() -> SparseCoder:
    made = SparseCoder.create(32, CoderConfig(d_sae=48, k=4))
    with torch.no_grad():
        made.W_enc.copy_(made.W_dec)
    return made


class Cut(Exception):
    """What ends an evaluation in these tests."""


def of(cfg: Config, *names: str, **settings) -> Config:
    return replace(cfg, eval=replace(cfg.eval, evals=names, **settings))


def test_what_finished_is_kept_when_the_machine_goes(cfg, coder, tmp_path, monkeypatch):
    path, names = tmp_path / "results.json", ("reconstruction", "sparsity", "downstream")
    whole = evaluate_held_out(coder, of(cfg, *names))

    def cut_off(*_args):
        raise Cut

    with monkeypatch.context() as patched:
        patched.setattr("sae.evals.downstream.Downstream.update", cut_off)
        with pytest.raises(Cut):
            evaluate_held_out(coder, of(cfg, *names), keep=lambda found: write_results(found, path))
    assert set(read_results(path).evals) == {"reconstruction", "sparsity"}

    said: list[str] = []
    before = finished_before(path, coder, of(cfg, *names), said.append)
    with monkeypatch.context() as patched:
        patched.setattr("sae.evals.reconstruction.Reconstruction.update", cut_off)
        found = evaluate_held_out(
            coder, of(cfg, *names), before=before, keep=lambda one: write_results(one, path)
        )
    assert found.metrics == whole.metrics
    assert list(found.evals) == list(names)
    assert read_results(path).metrics == whole.metrics
    assert found.arrays.keys() == whole.arrays.keys()
    assert said == [
        f"Kept from {path}: reconstruction, sparsity. (`--again true` runs them again.)"
    ]


def test_nothing_left_runs_nothing(cfg, coder, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    whole = evaluate_held_out(coder, of(cfg, "sparsity"))
    write_results(whole, path)
    monkeypatch.setattr("sae.evals.sparsity.Sparsity.update", None)
    before = finished_before(path, coder, of(cfg, "sparsity"))
    found = evaluate_held_out(coder, of(cfg, "sparsity"), before=before)
    assert found.metrics == whole.metrics


def test_more_evals_join_those_of_before(cfg, coder, tmp_path):
    path = tmp_path / "results.json"
    write_results(evaluate_held_out(coder, of(cfg, "sparsity")), path)
    before = finished_before(path, coder, of(cfg, "reconstruction"))
    found = evaluate_held_out(coder, of(cfg, "reconstruction"), before=before)
    assert list(found.evals) == ["reconstruction", "sparsity"]


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"tokens": 500}, {"sparsity", "downstream"}),
        ({"seed": 3}, {"sparsity", "downstream"}),
        ({"downstream_tokens": 100}, {"downstream"}),
        ({"judge_latents": 8}, set()),
        ({"judge_tries": 2}, set()),
    ],
)
def test_evals_that_a_setting_changes_are_run_again(cfg, coder, tmp_path, changes, gone):
    path, names = tmp_path / "results.json", ("sparsity", "downstream")
    write_results(evaluate_held_out(coder, of(cfg, *names)), path)
    said: list[str] = []
    before = finished_before(path, coder, of(cfg, *names, **changes), said.append)
    assert set(before.evals) == set(names) - gone
    own = {name for name, row in EVALS.items() if name in gone for name in row.labels}
    assert not own & before.metrics.keys()
    (key, value), *_ = changes.items()
    assert (f"eval.{key} was" in said[0]) == bool(gone)
    assert (f"now {value}" in said[0]) == bool(gone)


def test_an_eval_whose_judge_was_out_of_reach_has_not_finished(cfg, coder, tmp_path):
    path = tmp_path / "results.json"
    asked = of(cfg, "sparsity", "autointerp")
    found = evaluate_held_out(coder, asked)
    write_results(found, path)
    assert set(finished_before(path, coder, asked).evals) == {"sparsity", "autointerp"}
    write_results(replace(found, metrics={**found.metrics, "judge_unreached": 0.5}), path)
    said: list[str] = []
    assert set(finished_before(path, coder, asked, said.append).evals) == {"sparsity"}
    assert said[0] == "Run again: autointerp; autointerp lacks answers."


def test_results_of_another_version_or_without_settings_are_not_kept(cfg, coder, tmp_path):
    path = tmp_path / "results.json"
    write_results(evaluate_held_out(coder, of(cfg, "sparsity")), path)
    content = json.loads(path.read_text())
    for changes in ({"sae": "0.0.1"}, {"settings": None}):
        old = {**content, "provenance": {**content["provenance"], **changes}}
        path.write_text(json.dumps(old))
        assert finished_before(path, coder, of(cfg, "sparsity")) == NOTHING


def test_results_of_another_dictionary_are_refused_by_name(cfg, coder, tmp_path):
    path = tmp_path / "results.json"
    write_results(evaluate_held_out(coder, of(cfg, "sparsity")), path)
    with torch.no_grad():
        coder.b_enc[0] += 1
    with pytest.raises(
        ValueError, match=r"those of another one \(model.layers.1, 48 latents, L0 4"
    ):
        finished_before(path, coder, of(cfg, "sparsity"))


def test_no_file_is_nothing(cfg, coder, tmp_path):
    assert finished_before(tmp_path / "results.json", coder, cfg) is NOTHING


def test_the_seed_of_training_does_not_choose_what_is_evaluated(cfg, coder):
    other = replace(cfg, run=replace(cfg.run, seed=5))
    found = [evaluate_held_out(coder, of(one, "sparsity")).provenance for one in (cfg, other)]
    assert found[0]["evaluated"] == found[1]["evaluated"]
    moved = evaluate_held_out(coder, of(cfg, "sparsity", seed=5)).provenance
    assert moved["evaluated"] != found[0]["evaluated"]


def test_documents_are_recorded_and_training_saw_none(cfg, coder):
    coder.metadata |= {"held_out_fraction": 0.2, "dataset_path": cfg.data.source}
    results = evaluate_held_out(coder, of(cfg, "sparsity"))
    documents = results.provenance["documents"]
    assert documents["disjoint_from_training"]
    assert documents["source"] == cfg.data.source
    ids = results.arrays["evaluated/document_ids"]
    assert len(ids) == len(ids.unique()) == results.provenance["n_documents"]


def test_a_larger_share_of_the_same_text_is_refused(cfg):
    metadata = {"held_out_fraction": 0.05, "dataset_path": cfg.data.source}
    with pytest.raises(ValueError, match=r"held out 0.05 of .* 0.2 takes more. Use at most 0.05"):
        documents_of(metadata, cfg)
    assert documents_of({**metadata, "dataset_path": "x"}, cfg)["disjoint_from_training"] is None
    assert documents_of({}, cfg)["disjoint_from_training"] is None
    assert documents_of({**metadata, "held_out_fraction": 0.3}, cfg)["disjoint_from_training"]


def test_nulls_are_kept_with_all_evals_or_measured_anew(cfg, coder, tmp_path, monkeypatch):
    path, names = tmp_path / "results.json", ("reconstruction", "sparsity")
    alone = evaluate_held_out(coder, of(cfg, *names))
    write_results(alone, path)
    with_null = of(cfg, *names, nulls=("shuffled",))
    before = finished_before(path, coder, with_null)
    assert set(before.evals) == set(names), "nulls are no setting of the dictionary's own numbers"
    found = evaluate_held_out(coder, with_null, before=before)
    assert found.metrics == alone.metrics
    assert found.nulls["shuffled"].metrics["fvu"] > found.metrics["fvu"]  # type: ignore[operator]
    write_results(found, path)
    monkeypatch.setattr("sae.evals.reconstruction.Reconstruction.update", None)
    again = evaluate_held_out(coder, with_null, before=finished_before(path, coder, with_null))
    assert again.nulls == found.nulls


def test_nulls_take_one_process(cfg, coder, monkeypatch):
    monkeypatch.setattr("sae.evals.ranks.Ranks.here", lambda: Ranks(0, 2))
    with pytest.raises(ValueError, match="one process; got 2 for shuffled"):
        evaluate_held_out(coder, of(cfg, "sparsity", nulls=("shuffled",)))
