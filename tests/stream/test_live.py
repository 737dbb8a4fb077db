"""Activations from a model: what the buffer receives is what the model computes on kept tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_rows import CPU, assert_resumes_exactly

from sae.config import StreamConfig
from sae.configuration import from_flat
from sae.stream.buffered import BufferedSource, buffer_tokens
from sae.stream.live import captured_contexts
from sae.stream.opening import OpenedModel, open_model
from sae.stream.reader import Reader


def settings(tiny_lm_folder: Path, tiny_text_file: Path, **more: Any) -> dict[str, Any]:
    return {
        "model.name": str(tiny_lm_folder),
        "model.hookpoint": "model.layers.1",
        "model.dtype": "float32",
        "data.source": str(tiny_text_file),
        "data.context_size": 32,
        "stream.buffer_tokens": 500,
        "stream.sequences_per_forward": 4,
        "stream.calibration_sequences": 6,
        **more,
    }


@pytest.fixture(scope="module")
def opened(tiny_lm_folder: Path, tiny_text_file: Path) -> OpenedModel:
    return open_model(from_flat(settings(tiny_lm_folder, tiny_text_file)), CPU)


def source(opened: OpenedModel, n_lanes: int = 1, **more) -> BufferedSource:
    reader = opened.reader()
    return BufferedSource(
        {i: opened.rows(reader, lane=i, n_lanes=n_lanes) for i in range(n_lanes)},
        opened.cfg.stream,
        context_size=32,
        seed=0,
        device=CPU,
        **more,
    )


def kept_rows(opened: OpenedModel, n: int) -> torch.Tensor:
    contexts = opened.contexts("train")
    batches = iter(lambda: contexts.next_batch(4), None)
    rows, n_rows = [], 0
    for batch in captured_contexts(Reader(opened.lm, opened.hookpoints[:1]), batches):
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
    (storage,) = live.lanes[0].buffer.storage
    assert torch.equal(sorted_rows(storage), sorted_rows(kept_rows(opened, 500)))
    assert live.next_batch(7).shape == (7, live.widths[0])


def test_the_buffer_knows_the_document_of_each_row(opened: OpenedModel):
    """All rows of a document that the buffer holds whole are as many as its kept tokens."""
    live = source(opened)
    live.warm_up(lambda *_: None)
    contexts = opened.contexts("train").next_batch(32)
    kept = contexts.document_ids[contexts.is_kept][:500]
    documents = live.lanes[0].buffer.documents
    assert torch.equal(documents.bincount(), kept.bincount())


def test_calibrating_consumes_nothing(opened: OpenedModel):
    calibrated, plain = source(opened), source(opened)
    sample = calibrated.calibration_sample()
    assert torch.equal(sample, kept_rows(opened, len(sample)))
    assert len(sample) > 6 * 20
    assert torch.equal(calibrated.next_batch(100), plain.next_batch(100))


@pytest.mark.parametrize("refill", ["inline", "thread"])
@pytest.mark.parametrize("n_lanes", [1, 2])
def test_resume_is_exact(tiny_lm_folder: Path, tiny_text_file: Path, refill: str, n_lanes: int):
    """Into the second epoch of the text: a pass gives some 9,000 rows."""
    more = {"stream.refill": refill, "stream.sequences_per_forward": 16}
    cfg = from_flat(settings(tiny_lm_folder, tiny_text_file, **more))
    opened = open_model(cfg, CPU)
    made: list[BufferedSource] = []

    def make() -> BufferedSource:
        made.append(source(opened, n_lanes))
        return made[-1]

    stops = (0, 1, 3, 13, 16, 29)
    assert_resumes_exactly(make, batch=1600, stops=stops, n_after=2)
    assert any(lane.stream.epoch >= 1 for lane in made[0].lanes.values())


@pytest.fixture(scope="module")
def several(tiny_lm_folder: Path, tiny_text_file: Path) -> OpenedModel:
    """MLP in and out, concatenated heads, and two layers: each with its own width."""
    hookpoints = (
        "layers.2.mlp:in, layers.2.mlp.down_proj:in, layers.1.self_attn.o_proj:in, layers.[01]"
    )
    more = {"model.hookpoint": hookpoints}
    return open_model(from_flat(settings(tiny_lm_folder, tiny_text_file, **more)), CPU)


def test_several_hookpoints_come_from_one_forward(several: OpenedModel):
    live = source(several)
    assert live.names == (
        "model.layers.2.mlp:in",
        "model.layers.2.mlp.down_proj:in",
        "model.layers.1.self_attn.o_proj:in",
        "model.layers.0",
        "model.layers.1",
    )
    assert len(set(live.widths)) > 1
    with counting_layers(several) as ran:
        batch = live.next_rows(100)
    n_forwards = ran.count("model.layers.0")
    assert n_forwards == ran.count("model.layers.2") >= 1
    assert "model.layers.3" not in ran
    assert "lm_head" not in ran
    assert [rows.shape for rows in batch] == [(100, width) for width in live.widths]
    # Rows at one place are of one token: those of the last hookpoint say which.
    alone = {tuple(row.tolist()): i for i, row in enumerate(kept_of(several, 4))}
    order = [alone[tuple(row.tolist())] for row in batch[4]]
    for number, rows in enumerate(batch):
        assert torch.equal(rows, kept_of(several, number)[order])


def counting_layers(opened: OpenedModel) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def counting() -> Iterator[list[str]]:
        ran: list[str] = []
        handles = [
            module.register_forward_pre_hook(lambda _m, _a, path=path: ran.append(path))
            for path, module in opened.lm.module.named_modules()
        ]
        yield ran
        for handle in handles:
            handle.remove()

    return counting()


def kept_of(opened: OpenedModel, number: int) -> torch.Tensor:
    contexts = opened.contexts("train")
    batches = [contexts.next_batch(4) for _ in range(6)]
    captured = captured_contexts(Reader(opened.lm, [opened.hookpoints[number]]), batches)
    return torch.cat([batch.activations[batch.is_kept] for batch in captured])


def test_no_float32_copy_is_made_of_a_bfloat16_model(tiny_lm_folder: Path, tiny_text_file: Path):
    more = {"model.dtype": "bfloat16", "data.max_norm_ratio": 10.0}
    opened = open_model(from_flat(settings(tiny_lm_folder, tiny_text_file, **more)), CPU)
    live = source(opened, max_norm_ratio=10.0)
    live.calibration_rows()
    assert live.next_batch(10).dtype == torch.bfloat16
    assert live.lanes[0].buffer.storage[0].dtype == torch.bfloat16
    assert live.lanes[0].stream.next_block().rows[0].dtype == torch.bfloat16


def test_one_dictionary_needs_one_hookpoint(several: OpenedModel):
    with pytest.raises(ValueError, match=r"exactly one module here; it matches 5:"):
        _ = several.hookpoint


def test_two_models_read_the_same_tokens(
    tiny_lm_folder: Path, tiny_text_file: Path, perturbed_folder: Path
):
    more = {"model.other": str(perturbed_folder)}
    opened = open_model(from_flat(settings(tiny_lm_folder, tiny_text_file, **more)), CPU)
    live = source(opened)
    assert live.names == ("model.layers.1", "other/model.layers.1")
    mine, others = live.next_rows(200)
    assert not torch.equal(mine, others)
    assert torch.nn.functional.cosine_similarity(mine, others).min() > 0.9
    shuffled = others[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert torch.nn.functional.cosine_similarity(mine, shuffled).mean() < 0.8
    with pytest.raises(ValueError, match=r"`model.other` must be left out here"):
        _ = opened.hookpoint


@pytest.fixture
def perturbed_folder(tiny_lm_folder: Path, tmp_path: Path) -> Path:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "perturbed"
    shutil.copytree(tiny_lm_folder, folder)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    noisy = {
        name: w + 0.02 * w.std() * torch.randn(w.shape, generator=generator) if w.ndim == 2 else w
        for name, w in weights.items()
    }
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_models_with_other_tokenizers_are_refused_before_weights(
    tiny_lm_folder: Path, tiny_text_file: Path, perturbed_folder: Path, monkeypatch
):
    import sae.stream.opening as opening

    words = perturbed_folder / "tokenizer.json"
    words.write_text(words.read_text().replace('"<eos>"', '"<end>"'))
    config = perturbed_folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"<eos>"', '"<end>"'))
    monkeypatch.setattr(opening, "load_language_model", lambda *_: pytest.fail("weights"))
    more = {"model.other": str(perturbed_folder)}
    with pytest.raises(ValueError, match=r"`model.other` must have the tokenizer of `model.name`"):
        open_model(from_flat(settings(tiny_lm_folder, tiny_text_file, **more)), CPU)


def test_a_buffer_is_deeper_than_twenty_contexts_by_default():
    for context_size in (128, 1024, 8192):
        assert buffer_tokens(StreamConfig(), context_size) >= 20 * context_size
    assert buffer_tokens(StreamConfig(buffer_tokens=77), 128) == 77
