"""`sae compare`: what is opened, what the figures are, and what is written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae.analysis.comparison import compare, write_comparison
from sae.analysis.comparison.entries import open_entries
from sae.analysis.comparison.figures import CANDIDATES, PW_MCC, figures_of, on_front
from sae.analysis.comparison.printed import print_comparison
from sae.axes import Axis
from sae.cli import main
from sae.coder import SparseCoder
from sae.config import CoderConfig, Config, RunConfig
from sae.configuration import CONFIG_FILE, to_yaml
from sae.evals import EVALS, activation_contexts, evaluate, write_results
from sae.evals.pairing import Difference

D, N = 16, 400


def rows() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def coder(k: int, seed: int) -> SparseCoder:
    made = SparseCoder.create(D, CoderConfig(d_sae=32, k=k), seed=seed)
    with torch.no_grad():
        made.W_enc.copy_(made.W_dec)
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of k 2, 4 and 8; of k 4 also a second seed. What `sae train` and `eval` leave."""
    root = tmp_path_factory.mktemp("runs")
    for name, k, seed in (("k2", 2, 0), ("k4", 4, 0), ("k4_again", 4, 1), ("k8", 8, 0)):
        folder = root / name
        made = coder(k, seed)
        made.save(folder / "final")
        cfg = Config(coder=made.cfg, run=RunConfig(seed=seed, folder=str(folder)))
        (folder / CONFIG_FILE).write_text(to_yaml(cfg))
        results = evaluate(made, activation_contexts([rows()]), n_resamples=50)
        write_results(results, folder / "results.json")
    return root


def paths(runs: Path) -> list[Path]:
    return sorted(path for path in runs.iterdir() if path.is_dir())


def test_run_folders_dictionary_folders_and_files_are_opened(runs, tmp_path):
    bare = tmp_path / "bare"
    coder(3, 0).save(bare)
    write_results(
        evaluate(coder(3, 0), activation_contexts([rows()]), n_resamples=50), bare / "results.json"
    )
    entries = open_entries([runs / "k2", runs / "k4" / "results.json", bare])
    assert [entry.name for entry in entries] == ["k2", "k4", "bare"]
    assert [entry.settings["activation"] for entry in entries] == ["topk", "topk", None]


def test_names_are_the_shortest_that_differ(runs, tmp_path):
    (tmp_path / "other").mkdir()
    results = evaluate(coder(4, 0), activation_contexts([rows()]), n_resamples=50)
    write_results(results, tmp_path / "other" / "k4" / "results.json")
    entries = open_entries([runs / "k4", tmp_path / "other" / "k4"])
    assert [entry.name for entry in entries] == [f"{runs.name}/k4", "other/k4"]


def test_the_front_is_of_those_that_nothing_beats_in_both(runs):
    entries = open_entries(paths(runs))
    values = {"k2": 0.5, "k4": 0.3, "k4_again": 0.4, "k8": 0.3}
    found = [
        replace(e, results=replace(e.results, metrics={"fvu": values[e.name]})) for e in entries
    ]
    assert on_front(found, "fvu", "low") == {"k2", "k4"}
    assert on_front(found, "fvu", "high") == {"k2"}


def test_seeds_agree_as_far_as_their_directions_do(runs):
    found = compare(paths(runs))
    assert found.pw_mcc.keys() == {"k4", "k4_again"}
    rows_a, rows_b = (coder(4, seed).W_dec.detach().double() for seed in (0, 1))
    cosines = (rows_a @ rows_b.T).abs().numpy()
    from scipy.optimize import linear_sum_assignment

    pairs = linear_sum_assignment(cosines, maximize=True)
    assert found.pw_mcc["k4"] == pytest.approx(float(cosines[pairs].mean()), rel=1e-6)


def test_the_files_hold_every_pair_and_the_page_stands_alone(runs, tmp_path):
    found = compare(paths(runs))
    page = write_comparison(found, tmp_path).read_text()
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["is_paired"]
    assert [row["name"] for row in content["dictionaries"]] == ["k2", "k4", "k4_again", "k8"]
    pairs = [(pair["a"], pair["b"]) for pair in content["differences"]]
    assert len(pairs) == 6
    assert ("k8", "k2") in pairs
    fvu = content["differences"][pairs.index(("k8", "k2"))]["metrics"]["fvu"]
    metrics = {row["name"]: row["metrics"] for row in content["dictionaries"]}
    assert fvu["value"] == pytest.approx(metrics["k8"]["fvu"] - metrics["k2"]["fvu"])
    assert fvu["low"] < fvu["value"] < fvu["high"]
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for name in ("k2", "k4_again", "k8"):
        assert f"<code>{name}</code>" in page
    assert page.count("<circle") >= 4
    assert "PW-MCC" in page


def test_a_dead_dictionary_is_drawn_too(runs, tmp_path):
    dead = coder(4, 0)
    with torch.no_grad():
        dead.b_enc.fill_(-1e6)
    results = evaluate(dead, activation_contexts([rows()]), n_resamples=50)
    write_results(results, tmp_path / "dead" / "results.json")
    write_comparison(compare([runs / "k4", tmp_path / "dead"]), tmp_path)
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["dictionaries"][1]["l0"] == 0
    assert content["dictionaries"][1]["headline"]["dead"]["value"] == 1


def test_on_the_command_line(runs, tmp_path, capsys):
    main(["compare", *map(str, paths(runs)), "--out", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "less that of k2" in printed
    assert "PW-MCC" in printed
    assert "compare.html in a browser" in printed


def test_a_narrow_terminal_keeps_the_names_and_the_differences(runs, capsys, monkeypatch):
    """Beside the longest numbers there are: KL, with its interval and difference."""
    monkeypatch.setenv("COLUMNS", "80")
    found = compare([runs / "k2", runs / "k4"])
    kl = {"kl": 13.3276, "kl/low": 13.2467, "kl/high": 13.5104}
    entries = [
        replace(e, results=replace(e.results, metrics={**e.results.metrics, **kl}))
        for e in found.entries
    ]
    pairs = {("k4", "k2"): {"kl": Difference(-13.0079, -13.1744, -12.9064)}}
    figures = figures_of(entries, {})
    print_comparison(replace(found, entries=entries, figures=figures, differences=pairs))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    at = lines.index(["KL,", "nats"])
    assert lines[at + 1] == ["k2", "13.328", "13.247", "…", "13.510"]
    assert lines[at + 2][0] == "k4"
    assert " ".join(lines[at + 2][5:]) == "−13.008 (−13.174 … −12.906)"


def test_results_of_other_seeds_are_compared_only_where_asked(runs, tmp_path, capsys):
    results = evaluate(coder(4, 0), activation_contexts([rows()]), n_resamples=50, seed=1)
    write_results(results, tmp_path / "other" / "results.json")
    arguments = ["compare", str(runs / "k4"), str(tmp_path / "other"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "k4 and other differ in: seed 0 and 1" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "compare.html").exists()
    main([*arguments, "--unpaired", "true"])
    content = json.loads((tmp_path / "compare.json").read_text())
    assert (content["is_paired"], content["differences"]) == (False, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{runs}/k2"], "at least two dictionaries must be given; got 1"),
        (["{runs}/k2", "{runs}/k2/results.json"], "must be given once"),
        (["{runs}/k2", "{runs}"], "Run `sae eval"),
        (["{runs}/k2", "{runs}/k4", "--pair", "true"], "takes --out and --unpaired; got --pair"),
        (["{runs}/k2", "{runs}/k4", "--unpaired", "yes"], "must be true or false"),
        (["{runs}/k2", "{runs}/k4/config.yaml"], "config.yaml"),
    ],
)
def test_mistakes(runs, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *(word.replace("{runs}", str(runs)) for word in arguments)])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [0.12, 0.19], [-0.4, 0.3], [0, 250]])
def test_a_linear_axis_holds_its_values_and_has_round_ticks(values):
    axis = Axis(values, 0, 100, linear=True)
    assert all(0 <= axis.at(value) <= 100 for value in values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 6
    for place, label in ticks:
        assert axis.at(float(label)) == pytest.approx(place, abs=0.06)


def test_every_figure_of_the_headline_is_a_metric_of_some_eval():
    known = {metric for row in EVALS.values() for metric in row.labels} | {PW_MCC}
    assert {figure.metric for among in CANDIDATES for figure in among} <= known
