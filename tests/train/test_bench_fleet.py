"""The benchmark of fleets: that it runs, and that the stream's cost is part of what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_fleet

TINY = ["--coders", "3", "--d", "16", "--d-sae", "32", "--k", "4", "--batch", "64", "--rows", "256"]


def test_a_dear_stream_is_paid_once_by_a_fleet(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Where nearly all is the stream, three coders of a fleet cost a third."""
    cheap = bench_fleet.main([*TINY, "--rounds", "3"])
    dear = bench_fleet.main(
        [*TINY, "--rounds", "3", "--gflop-per-token", "0.05", "--out", str(tmp_path)]
    )
    assert dear["sequence_stream_share"] > cheap["sequence_stream_share"]
    assert dear["ratio"] < 0.7
    assert dear["ratio_low"] <= dear["ratio"] <= dear["ratio_high"]
    (kept,) = tmp_path.glob("*-fleet.json")
    document = json.loads(kept.read_text())
    assert document["ratio"] == dear["ratio"]
    assert len(document["seconds_a_round"]["as a fleet"]) == 3
    printed = capsys.readouterr().out
    assert kept.with_suffix(".md").read_text() in printed
    assert printed.count("ratio ") == 2
    assert "load averages" in printed
