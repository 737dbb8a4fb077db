"""Writing leaves the old or the new, never something between."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae.files import new_folder, read_json, write_json, write_tensors, write_text


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_text_json_and_tensors_arrive(tmp_path: Path):
    write_text(tmp_path / "deep/er/a.txt", "α")
    write_json(tmp_path / "a.json", {"x": [1, None]})
    write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(6.0).reshape(2, 3).T})
    assert (tmp_path / "deep/er/a.txt").read_text(encoding="utf-8") == "α"
    assert read_json(tmp_path / "a.json") == {"x": [1, None]}
    assert torch.equal(
        load_file(tmp_path / "a.safetensors")["x"], torch.arange(6.0).reshape(2, 3).T
    )
    assert leftovers(tmp_path) == []


def test_json_refuses_nan(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_text(tmp_path / "a.txt", "old")

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sae.files.sync", full)
    with pytest.raises(RuntimeError, match=r"a\.txt.*the disk is full.*unharmed"):
        write_text(tmp_path / "a.txt", "new")
    with pytest.raises(RuntimeError, match="the disk is full"):
        write_tensors(tmp_path / "a.txt", {"x": torch.zeros(1)})
    assert (tmp_path / "a.txt").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path):
    with new_folder(tmp_path / "d") as beside:
        write_text(beside / "a", "1")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d/a").read_text() == "1"
    with pytest.raises(KeyError):
        fail_half_way(tmp_path / "d")
    assert (tmp_path / "d/a").read_text() == "1"
    with new_folder(tmp_path / "d") as beside:
        write_text(beside / "b", "3")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["b"]
    assert leftovers(tmp_path) == []


def fail_half_way(folder: Path) -> None:
    with new_folder(folder) as beside:
        write_text(beside / "a", "2")
        raise KeyError


def test_a_folder_that_stepped_aside_before_a_kill_comes_back(tmp_path: Path):
    with new_folder(tmp_path / "d") as beside:
        write_text(beside / "a", "1")
    (tmp_path / "d").rename(tmp_path / ".d.old")
    with pytest.raises(KeyError):
        fail_half_way(tmp_path / "d")
    assert (tmp_path / "d/a").read_text() == "1"
