"""Tensors, arrays, files and iterators as sources."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toy_rows import assert_resumes_exactly, saved

from sae.stream.arrays import ArraySource, open_source
from sae.stream.source import NonFiniteActivationsError


def rows(n: int = 50) -> torch.Tensor:
    return torch.arange(n).float()[:, None].expand(n, 3).contiguous()


def ids(batch: torch.Tensor) -> list[int]:
    return batch[:, 0].int().tolist()


def test_each_epoch_is_a_new_permutation_of_all_rows():
    source = open_source(rows(), seed=1)
    first, second = ids(source.next_batch(50)), ids(source.next_batch(50))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != list(range(50))


def test_kinds_of_input_give_the_same_batches(tmp_path: Path):
    np.save(tmp_path / "rows.npy", rows().numpy())
    save_file({"activations": rows(), "other": torch.zeros(1)}, tmp_path / "rows.safetensors")
    (tmp_path / "parts").mkdir()
    np.save(tmp_path / "parts/a.npy", rows().numpy()[:20])
    save_file({"x": rows()[20:]}, tmp_path / "parts/b.safetensors")
    kinds = [rows().numpy(), tmp_path / "rows.npy", str(tmp_path / "rows.safetensors")]
    expected = ids(open_source(rows(), seed=4).next_batch(70))
    for kind in [*kinds, tmp_path / "parts"]:
        assert ids(open_source(kind, seed=4).next_batch(70)) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_processes_divide_every_batch_of_one_order(world_size: int):
    """Across epoch edges, and beyond a whole epoch in one batch."""
    alone = open_source(rows(), seed=5)
    parts = [open_source(rows(), seed=5, rank=r, world_size=world_size) for r in range(world_size)]
    for n in (12, 24, 48, 132, 12):
        together = [i for part in parts for i in ids(part.next_batch(n // world_size))]
        assert together == ids(alone.next_batch(n))


def test_resume_is_exact_across_an_epoch_edge():
    def make():
        return open_source(rows(), seed=2)

    assert_resumes_exactly(make, batch=20, stops=(0, 1, 2, 3, 5, 8))


def test_another_number_of_processes_goes_on_with_the_same_batches():
    alone = open_source(rows(), seed=5)
    first = [open_source(rows(), seed=5, rank=r, world_size=3) for r in range(3)]
    for source in (alone, *first):
        source.next_batch(36 if source is alone else 12)
    then = [open_source(rows(), seed=5, rank=r, world_size=2) for r in range(2)]
    for source in then:
        source.load_state(saved(first[0]))
    assert [i for part in then for i in ids(part.next_batch(15))] == ids(alone.next_batch(30))


def test_calibration_consumes_nothing():
    source, other = open_source(rows()), open_source(rows())
    assert source.calibration_sample().shape == (50, 3)
    assert ids(source.next_batch(10)) == ids(other.next_batch(10))
    pieces = open_source(iter(rows().split(20)))
    pieces.calibration_sample()
    assert ids(pieces.next_batch(30)) == list(range(30))


def test_an_iterator_keeps_its_order_and_says_when_it_ends():
    source = open_source(iter(rows().split(20)))
    assert ids(source.next_batch(50)) == list(range(50))
    with pytest.raises(ValueError, match="ended early"):
        source.next_batch(1)
    with pytest.raises(ValueError, match="checkpoints need"):
        source.state()
    with pytest.raises(ValueError, match="several processes"):
        open_source(iter(rows().split(20)), world_size=2)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(2, 2, dtype=torch.int)],
)
def test_what_is_no_matrix_is_refused(bad: torch.Tensor):
    with pytest.raises(ValueError, match="must be a floating-point matrix"):
        open_source(bad)


def test_what_is_no_source_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match="got int"):
        open_source(3)
    with pytest.raises(ValueError, match="is not there"):
        open_source(tmp_path / "none.npy")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"must be one of \['.npy', '.safetensors'\]; got a.csv"):
        open_source(tmp_path / "a.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it holds none"):
        open_source(tmp_path / "empty")


def test_damaged_and_pickled_files_are_refused(tmp_path: Path):
    np.save(tmp_path / "whole.npy", rows().numpy())
    data = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "half.npy").write_bytes(data[: len(data) // 2])
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "pickled.npy").write_bytes(pickle.dumps([1]))
    for name in ("half.npy", "half.safetensors", "pickled.npy"):
        with pytest.raises(ValueError, match=name):
            open_source(tmp_path / name)


def test_nan_is_named():
    bad = rows()
    bad[7, 1] = float("nan")
    source = ArraySource(bad, "layer.3", seed=0)
    with pytest.raises(NonFiniteActivationsError, match=r"`layer.3`.*1 of 50 tokens"):
        source.next_batch(50)
