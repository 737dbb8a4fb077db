"""`sae eval` and `sae report` as a user runs them, on a run of the tiny language model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sae.cli import VERBS, main
from sae.evals import EVALS


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_run_tree: dict[str, dict]) -> Path:
    """A run of 20 steps on the tiny model, trained through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_run_tree))
    main(["train", str(folder / "tiny.yaml"), "--run.folder", str(folder / "run")])
    return folder / "run"


def test_eval_writes_results_and_a_table(finished_run: Path, capsys: pytest.CaptureFixture):
    main(["eval", str(finished_run)])
    results = json.loads((finished_run / "results.json").read_text())
    assert results["provenance"]["hookpoint"] == "model.layers.1"
    assert 0 < results["metrics"]["fvu"] < 1
    assert set(results["evals"]) == {
        name for name, row in EVALS.items() if row.reads != "world" and row.cost != "minutes"
    }
    assert results["evals"]["downstream"]["n_tokens"] < 700
    printed = capsys.readouterr().out
    assert "held-out tokens" in printed
    assert "loss recovered" in " ".join(printed.split())
    assert printed.count("took ") == len(results["evals"])
    assert "shared by all: capture " in printed


def test_eval_of_chosen_measures_to_another_file(finished_run: Path, tmp_path: Path):
    out = tmp_path / "mine.json"
    flags = ["--evals", "sparsity,reconstruction", "--out", str(out), "--eval.tokens", "300"]
    main(["eval", str(finished_run), *flags])
    results = json.loads(out.read_text())
    assert set(results["evals"]) == {"reconstruction", "sparsity"}
    assert results["provenance"]["n_tokens"] < 340


def test_a_bare_dictionary_needs_only_its_text(
    finished_run: Path, tmp_path: Path, tiny_text_file: Path
):
    shutil.copytree(finished_run / "final", tmp_path / "d")
    main(
        [
            *("eval", str(tmp_path / "d"), "--data.source", str(tiny_text_file)),
            *("--data.held_out_fraction", "0.2", "--eval.tokens", "500"),
            *("--evals", "reconstruction"),
        ]
    )
    assert json.loads((tmp_path / "d/results.json").read_text())["metrics"]["fvu"] < 1


def test_report_writes_one_file(finished_run: Path, capsys: pytest.CaptureFixture):
    main(["report", str(finished_run)])
    page = (finished_run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page
    assert str(finished_run / "report.html") in capsys.readouterr().out
    assert (finished_run / "features.safetensors").exists()


def test_eval_of_a_hub_id_downloads_the_dictionary_and_writes_here(
    finished_run: Path,
    tmp_path: Path,
    tiny_text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """The hub is a stand-in: it hands out the run's dictionary under a folder's name."""
    asked = []

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns, ignore_patterns))
        shutil.copytree(finished_run / "final", tmp_path / "snapshot" / "layer_1")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = ("--data.source", str(tiny_text_file), "--data.held_out_fraction", "0.2")
    main(["eval", "owner/saes/layer_1", *text, "--evals", "sparsity", "--eval.tokens", "300"])
    ((name, wanted, left_out),) = asked
    assert (name, wanted) == ("owner/saes", ["layer_1/*"])
    assert "*.pt" in left_out  # pickles are never fetched
    found = json.loads((tmp_path / "here" / "results.json").read_text())
    assert found["metrics"]["l0"] == pytest.approx(4, abs=0.5)
    assert "Written to results.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{run}", "--evals", "recontruction"], "Did you mean 'reconstruction'"),
        (["eval", "/nowhere/at-all"], "must exist or be a hub id"),
        (["eval", "{run}", "--out"], "must be followed by a value"),
        (["eval", "{run}/final"], "`data.source` must name"),
        (["report", "/nowhere/at-all"], "must be a run folder"),
        (["eval", "{run}", "--model.hookpoint", "model.layers.2.mlp.up_proj"], "d_in"),
        (["evla"], "the first word must be one of train, plan, eval, compare, report, harvest"),
    ],
)
def test_mistakes_end_with_one_message(
    finished_run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as stopped:
        main([word.replace("{run}", str(finished_run)) for word in arguments])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("verb", ["eval", "report"])
def test_help(verb: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"usage: sae {verb}" in capsys.readouterr().out


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    """Only what the code raises on purpose is shown without one."""

    def broken(_arguments: object) -> None:
        from sae.coder import latents

        latents.from_dense(None)  # pyright: ignore[reportArgumentType]

    monkeypatch.setitem(VERBS, "broken", broken)
    with pytest.raises(AttributeError):
        main(["broken"])


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch):
    def interrupted(_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "interrupted", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["interrupted"])
    assert stopped.value.code == 130


def test_a_reader_that_leaves_ends_it_quietly():
    """As in `sae train --help | head`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "sae", "train", "--help"], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
