"""The benchmark of fleets: that it runs, and that the stream's cost is part of what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_fleet

TINY = ["--coders", "3", "--d", "16", "--d-sae", "32", "--k", "4", "--batch", "64", "--rows", "256"]


def test_a_dear_stream_is_paid_once_by_a_fleet(capsys: pytest.CaptureFixture[str]):
    """Where nearly all is the stream, three coders of a fleet cost a third."""
    cheap = bench_fleet.main([*TINY, "--rounds", "3"])
    dear = bench_fleet.main([*TINY, "--rounds", "3", "--gflop-per-token", "0.05"])
    assert dear["sequence_stream_share"] > cheap["sequence_stream_share"]
    assert dear["ratio"] < 0.7
    assert dear["ratio_low"] <= dear["ratio"] <= dear["ratio_high"]
    printed = capsys.readouterr().out
    assert printed.count("ratio ") == 2
    assert "load averages" in printed
