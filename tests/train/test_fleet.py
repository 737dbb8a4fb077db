"""Several coders on one stream: members, their folders, resume, and that each is a run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from user import run_here

import sae
from sae.configuration import from_command_line, from_flat, read_run_config
from sae.train import run
from sae.train.fleet_members import members_of
from sae.train.interrupt import Interrupted
from sae.train.tracking import read_metrics


def configured(path: Path, *flags: str) -> sae.Config:
    return from_command_line([str(path), *flags], "sae train")


def test_smoke(tiny_config, tmp_path):
    folder = run(configured(tiny_config, "--fleet.k", "2,4", "--fleet.hookpoint", "model.layers.1,layers.2", "--fleet.seed", "0,1"))
    import subprocess
    print(subprocess.run(["find",str(folder),"-size","+0"],capture_output=True,text=True).stdout)
    for m in folder.glob("*/final"):
        print(m, read_metrics(m.parent)[-1]["fvu"], sae.load(m).metadata)
