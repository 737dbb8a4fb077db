"""A finished run of the tiny model with its report, and its parts opened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sae.analysis import OpenedRun, open_run
from sae.cli import main

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """An installed Chromium; where there is none, tests skip, but in CI they fail."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        assert "CI" not in os.environ, "CI must have Chromium"
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def reported_run(tmp_path_factory: pytest.TempPathFactory, tiny_run_tree: dict[str, dict]) -> Path:
    """A run folder after `sae train`, `sae eval` and `sae report`; 96 latents."""
    folder = tmp_path_factory.mktemp("reported")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_run_tree))
    run = folder / "run"
    main(["train", str(folder / "tiny.yaml"), "--run.folder", str(run)])
    names = "fast,autointerp,absorption,monosemanticity,interventions"
    main(["eval", str(run), "--evals", names])
    main(["report", str(run)])
    return run


@pytest.fixture(scope="session")
def opened_run(reported_run: Path) -> OpenedRun:
    return open_run(reported_run)
