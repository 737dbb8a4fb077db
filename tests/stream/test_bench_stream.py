"""scripts/bench_stream.py runs on a tiny model, and writes what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sae.configuration import from_flat
from sae.stream.opening import open_model

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_stream
from benchmarking.stream_rates import truncated


def test_every_measure_has_a_row_and_a_limit(
    tiny_run_tree: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "tiny.yaml"
    tree = {**tiny_run_tree, "stream": {"buffer_tokens": 1000, "sequences_per_forward": 4}}
    config.write_text(yaml.safe_dump(tree))
    measures = ["live", "buffer", "waiting", "shards", "mixing"]
    options = ["--only", *measures, "--quick", "--out", str(tmp_path), "--disk", str(tmp_path)]
    path = bench_stream.main([str(config), *options, "--commit", "abc"])
    rows = json.loads(path.read_text())["rows"]
    assert {row["name"].split(":")[0] for row in rows} == set(measures)
    for row in rows:
        if "limit" in row:
            assert row["ratio"] == pytest.approx(row["value"] / row["limit"])
            assert row["is_met"] == (row["ratio"] >= float(row["goal"].removeprefix("≥ ")))
            assert row["value"] > 0
    page = path.with_suffix(".md").read_text()
    assert page.count("\n| ") == len(rows) + 2
    assert "abc" in page
    assert "Written:" in capsys.readouterr().out
    assert not list(tmp_path.glob("tmp*"))


def test_the_truncated_forward_runs_the_layers_that_are_read(
    tiny_run_tree: dict,
):
    flat = {f"{section}.{k}": v for section, part in tiny_run_tree.items() for k, v in part.items()}
    flat["model.hookpoint"] = "layers.2.mlp:in, layers.0"
    opened = open_model(from_flat(flat), torch.device("cpu"))
    ran: list[str] = []
    for path, module in opened.lm.module.named_modules():
        module.register_forward_pre_hook(lambda _m, _a, path=path: ran.append(path))
    truncated(opened, torch.zeros(1, 4, dtype=torch.int64))()
    assert "model.layers.2" in ran
    assert "model.layers.3" not in ran
    assert "lm_head" not in ran
    assert len(opened.lm.module.get_submodule("model.layers")._modules) == 4
