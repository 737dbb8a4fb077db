"""Small runs: on an array, and on the tiny language model through a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    """4096 activations (n, 16), each the sum of two of 32 directions, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)
    chosen = torch.randint(0, 32, (4096, 2), generator=generator)
    strengths = 1 + torch.rand(4096, 2, 1, generator=generator)
    return 30 * ((directions[chosen] * strengths).sum(1) + 2)


@pytest.fixture
def tiny_config(tmp_path: Path, tiny_lm_folder: Path, tiny_text_file: Path) -> Path:
    """A YAML file of a run on the tiny language model that takes a second; 24 steps."""
    tree = {
        "model": {
            "name": str(tiny_lm_folder),
            "hookpoint": "model.layers.1",
            "dtype": "float32",  # auto is bfloat16 on a CPU that multiplies it
        },
        "data": {
            "source": str(tiny_text_file),
            "context_size": 32,
            "held_out_fraction": 0.1,
        },
        "stream": {
            "buffer_tokens": 1000,
            "sequences_per_forward": 4,
            "calibration_sequences": 8,
        },
        "coder": {"d_sae": 48, "k": 4, "k_aux": 8},
        "train": {
            "tokens": 24 * 128,
            "batch_tokens": 128,
            "checkpoint_every_steps": 6,
            "log_every_steps": 3,
            "dead_refresh_steps": 4,
            "dead_after_tokens": 512,
        },
        "run": {"folder": str(tmp_path / "run")},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
