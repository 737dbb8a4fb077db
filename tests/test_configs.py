"""Every configuration that is shipped can be resolved, and says what it costs and gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae.coder.sites import Sites
from sae.config import ActivationName, CoderConfig, SiteName
from sae.configuration import from_command_line
from sae.train.run import resolve

FILES = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
CPU = torch.device("cpu")
N_PLACES: dict[SiteName, int] = {"sae": 1, "transcoder": 2, "crosscoder": 3, "cross_layer": 8}


def sites_like(site: SiteName) -> Sites:
    return Sites.of(CoderConfig(site=site), (256,) * N_PLACES[site])


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_configuration_resolves_without_a_warning(path: Path):
    cfg = from_command_line([str(path)], "sae train")
    resolved = resolve(cfg, sites_like(cfg.coder.site), None, CPU)
    assert resolved.train.lr
    assert resolved.coder.d_sae


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_its_header_says_hardware_minutes_and_what_to_expect(path: Path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(header).lower()
    assert "cpu" in text or "gpu" in text
    assert "minute" in text
    assert "expected" in text or "unmeasured" in text


@pytest.mark.parametrize("folder", ["worlds", "smollm2"])
def test_each_activation_has_one_on_a_world_and_on_a_model(folder: str):
    from typing import get_args

    names = {
        from_command_line([str(path)], "sae train").coder.activation
        for path in FILES
        if path.parent.name == folder or (folder == "smollm2" and path.stem == "quickstart")
    }
    assert names == set(get_args(ActivationName))
