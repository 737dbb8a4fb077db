"""Activations from a model: what the buffer receives is what the model computes on kept tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae.config import Config
from sae.configuration import from_flat
from sae.stream.live import LanguageModelSource, captured_contexts
from sae.stream.opening import OpenedModel, open_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def opened(tiny_lm_folder: Path, tiny_text_file: Path) -> OpenedModel:
    cfg: Config = from_flat(
        {
            "model.name": str(tiny_lm_folder),
            "model.hookpoint": "model.layers.1",
            "data.source": str(tiny_text_file),
            "data.context_size": 32,
            "stream.buffer_tokens": 500,
            "stream.sequences_per_forward": 4,
            "stream.calibration_sequences": 6,
        }
    )
    return open_model(cfg, CPU)


def source(opened: OpenedModel, **settings) -> LanguageModelSource:
    return LanguageModelSource(
        opened.lm,
        opened.hookpoint,
        lambda: opened.contexts("train"),
        opened.cfg.stream,
        context_size=32,
        seed=0,
        device=CPU,
        **settings,
    )


def kept_rows(opened: OpenedModel, n: int) -> torch.Tensor:
    contexts = opened.contexts("train")
    batches = iter(lambda: contexts.next_batch(4), None)
    rows, n_rows = [], 0
    for batch in captured_contexts(opened.lm, opened.hookpoint, batches):
        rows.append(batch.activations[batch.is_kept])
        n_rows += len(rows[-1])
        if n_rows >= n:
            break
    return torch.cat(rows)[:n]


def sorted_rows(x: torch.Tensor) -> torch.Tensor:
    return x[x[:, 0].argsort()]


def test_the_buffer_holds_the_first_kept_activations(opened: OpenedModel):
    live = source(opened)
    live.warm_up(lambda *_: None)
    assert torch.equal(sorted_rows(live.buffer.storage), sorted_rows(kept_rows(opened, 500)))
    assert live.next_batch(7).shape == (7, live.d_in)


def test_calibrating_consumes_nothing(opened: OpenedModel):
    calibrated, plain = source(opened), source(opened)
    sample = calibrated.calibration_sample()
    assert torch.equal(sample, kept_rows(opened, len(sample)))
    assert len(sample) > 6 * 20
    assert torch.equal(calibrated.next_batch(100), plain.next_batch(100))


def test_warming_up_tells_how_far_it_is(opened: OpenedModel):
    told: list[tuple[int, int]] = []
    source(opened).warm_up(lambda done, wanted: told.append((done, wanted)))
    assert told[-1] == (500, 500)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_buffer_is_deeper_than_twenty_contexts_by_default():
    from sae.config import StreamConfig
    from sae.stream.live import buffer_tokens

    for context_size in (128, 1024, 8192):
        assert buffer_tokens(StreamConfig(), context_size) >= 20 * context_size
    assert buffer_tokens(StreamConfig(buffer_tokens=77), 128) == 77
