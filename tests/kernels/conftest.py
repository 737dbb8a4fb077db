"""Fixtures of the ops' tests: a seeded generator, and no memory that happens to be right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty_tensors() -> Iterator[None]:
    """Fill every torch.empty with NaN, so that an element nobody wrote fails the comparison."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
