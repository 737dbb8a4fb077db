"""Fixtures of the evals' tests: the tiny language model, loaded, and contexts for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae.config import ModelConfig
from sae.stream.contexts import Contexts
from sae.stream.hookpoints import Hookpoint, find_hookpoint
from sae.stream.language_model import LanguageModel, load_language_model

BOS = 0


@pytest.fixture(scope="session")
def lm(tiny_lm_folder: Path) -> LanguageModel:
    return load_language_model(ModelConfig(name=str(tiny_lm_folder), dtype="float32"), "cpu")


@pytest.fixture(scope="session")
def hookpoint(lm: LanguageModel) -> Hookpoint:
    return find_hookpoint(lm.module, "model.layers.1")


@pytest.fixture(scope="session")
def contexts() -> Contexts:
    """Twelve contexts of 24 tokens, each BOS and 11 tokens of one document, twice."""
    tokens = torch.randint(3, 300, (12, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, ::12] = BOS
    document_ids = torch.arange(24).repeat_interleave(12).reshape(12, 24)
    return Contexts(tokens, document_ids, tokens != BOS)
