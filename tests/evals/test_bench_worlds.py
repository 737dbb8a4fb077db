"""The comparison on a world: what it writes, that it goes on, merges, and never skips silently."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_worlds  # noqa: E402 - a script is not installed
from benchmarking import world_runs  # noqa: E402

SMALL = [
    *("--world", "matryoshka_toy", "--samples", "6400", "--rows", "1024", "--commit", "none"),
    *("--set", "coder.d_sae=32", "coder.k=2", "train.batch_tokens=64", "train.lr=1e-2"),
]


def run(out: Path, *flags: str) -> dict:
    return json.loads(bench_worlds.main([*SMALL, "--out", str(out), *flags]).read_text())


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "a.json"
    run(path, "--recipes", "topk", "--seeds", "0", "1")
    run(path, "--recipes", "nulls", "--seeds", "0")
    return path


def test_every_run_is_a_row_and_every_recipe_a_line(out: Path):
    document = json.loads(out.read_text())
    assert len(document["rows"]) == 2 + len(world_runs.NULLS)
    rows = {(row["recipe"], row["seed"]): row for row in document["rows"]}
    f1 = {name: rows[name, 0]["metrics"]["f1"] for name in ("topk", *world_runs.NULLS)}
    assert f1["oracle"] == 1
    assert f1["topk"] > f1["random directions"]
    assert f1["oracle"] > f1["topk"]
    topk = rows["topk", 0]
    assert topk["seconds"] > 0
    assert topk["data_seconds"] > 0
    assert topk["samples_per_second"] == pytest.approx(6400 / topk["seconds"])
    assert topk["metrics"] != rows["topk", 1]["metrics"]
    page = out.with_suffix(".md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| topk"))
    assert line.startswith("| topk | 2 |")
    assert line.count("±") == 10


def test_the_same_command_goes_on_and_trains_nothing_again(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    before = json.loads(out.read_text())
    monkeypatch.setattr(bench_worlds, "train", lambda *_: pytest.fail("trained again"))
    assert run(out, "--recipes", "topk", "--seeds", "0", "1") == before
    assert "there already" in capsys.readouterr().out


def test_results_of_two_processes_merge(out: Path, tmp_path: Path):
    other, joined = tmp_path / "b.json", tmp_path / "c.json"
    run(other, "--recipes", "batchtopk", "--seeds", "0")
    document = run(joined, "--merge", str(out), str(other))
    names = {row["recipe"] for row in document["rows"]}
    assert names == {"topk", "batchtopk", *world_runs.NULLS}
    assert "| batchtopk | 1 |" in joined.with_suffix(".md").read_text()


def test_results_of_another_length_are_not_mixed_in(out: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        run(out, "--recipes", "topk", "--samples", "640")
    assert "the same samples" in capsys.readouterr().err


def test_what_metrics_make_of_truth_trained_and_nulls(tmp_path: Path):
    names = [name for name in world_runs.METRICS if name in ("oracle", "batchtopk", "topk")]
    nulls = [name for name in world_runs.METRICS if name not in world_runs.RECIPES]
    kept = tmp_path / "kept"
    flags = ("--seeds", "0", "--keep", str(kept), "--recipes", *names, *nulls)
    document = run(tmp_path / "m.json", *flags)
    rows = {row["recipe"]: row["metrics"] for row in document["rows"]}
    assert {path.name for path in kept.iterdir()} == {"batchtopk-0", "topk-0", "frozen-0"}
    whole, permuted, shuffled = (rows[name] for name in ("batchtopk", *list(world_runs.BROKEN)))
    assert whole["f1_act"] == permuted["f1_act"]
    assert whole["f1"] > permuted["f1"]
    assert whole["mcc"] == shuffled["mcc"]
    assert whole["code_mcc"] > shuffled["code_mcc"] + 0.1
    page = (tmp_path / "m.md").read_text()
    _, judged = page.split("## What metrics make of them")
    assert "| PCA |" in judged
    assert "Spearman" in judged
    mcc = next(line for line in judged.splitlines() if line.startswith("- MCC:"))
    assert mcc.endswith("random directions over batchtopk, codes shuffled")
    order = next(line for line in judged.splitlines() if line.startswith("- code-MCC:"))
    assert "codes shuffled" not in order


def test_what_cannot_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    impossible = tmp_path / "impossible.yaml"
    impossible.write_text("coder: {k: 2, prefixes: [40]}\n")
    monkeypatch.setitem(world_runs.RECIPES, "impossible", impossible)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    names = ["impossible", "sae-lens batchtopk"]
    document = run(tmp_path / "d.json", "--seeds", "0", "--recipes", *names)
    assert ["metrics" in row for row in document["rows"]] == [False, False]
    page = (tmp_path / "d.md").read_text()
    assert "sae-lens is not installed" in page
    assert "impossible: ValueError" in page
    assert "not installed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path / "e.json", "--recipes", "topkk")


@pytest.mark.sae_lens
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae-lens not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_peers_train_on_the_same_samples(tmp_path: Path):
    document = run(tmp_path / "f.json", "--seeds", "0", "--recipes", "sae-lens")
    for row in document["rows"]:
        assert row["saved as"] == "JumpReLUSAE"
        assert 0 < row["metrics"]["f1"] <= 1
