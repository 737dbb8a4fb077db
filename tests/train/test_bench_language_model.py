"""The comparison of coders on a language model: what it writes, and that it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_language_model  # noqa: E402 - a script is not installed


@pytest.fixture
def command(tiny_config: Path, tmp_path: Path) -> list[str]:
    other = tmp_path / "batch.yaml"
    other.write_text(tiny_config.read_text().replace("k_aux: 8", "activation: batchtopk"))
    return [
        *("--configs", str(tiny_config), str(other), "--seeds", "0", "1", "--threads", "1"),
        *("--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "out.json")),
        *("--set", "eval.tokens=512", "eval.downstream_tokens=256"),
    ]


def test_every_run_is_a_row_and_the_same_command_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    document = json.loads(bench_language_model.main(command).read_text())
    found = {(row["coder"], row["seed"]): row for row in document["rows"]}
    assert found.keys() == {(name, seed) for name in ("tiny", "batch") for seed in (0, 1)}
    assert all(row["metrics"]["fvu"] > 0 for row in found.values())
    assert all(row["metrics"]["kl"] > 0 for row in found.values())
    assert found["tiny", 0]["metrics"] != found["tiny", 1]["metrics"]
    lines = (tmp_path / "out.md").read_text().splitlines()
    assert sum(line.startswith(("| tiny | 2 |", "| batch | 2 |")) for line in lines) == 2
    monkeypatch.setattr(bench_language_model, "measured", lambda *_: pytest.fail("trained again"))
    assert json.loads(bench_language_model.main(command).read_text()) == document


def test_a_word_that_is_no_setting_is_refused(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        bench_language_model.main(["--set", "train.tokens"])
    assert "`--set` must be KEY=VALUE; got 'train.tokens'" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _threads():
    """The script sets the process' threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
