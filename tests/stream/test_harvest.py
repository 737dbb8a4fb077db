"""`sae harvest`: what the model computes, once on disk, whatever happens meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from harvest_cases import configured, contents

from sae.cli import main
from sae.config import Config
from sae.configuration import to_yaml
from sae.stream import harvest as harvesting
from sae.stream import harvest_size, opening, reader, shard_files
from sae.stream.contexts import Contexts
from sae.stream.harvest import harvest
from sae.stream.harvest_size import Size, readable, token_bytes
from sae.stream.hookpoints import Hookpoint, capture, choose_names
from sae.stream.manifest import MANIFEST, Manifest, read_complete
from sae.stream.shard_files import ShardFile
from sae.stream.shards import ShardRows, open_shards
from sae.stream.source import NonFiniteActivationsError

HOOKPOINTS = [Hookpoint("model.layers.1"), Hookpoint("model.layers.2.mlp", "in")]
Usage = namedtuple("Usage", "total used free")


LOADED: dict[str, object] = {}


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load a model once: loading takes longer than harvesting."""
    honest = opening.load_language_model

    def load(cfg, device):
        LOADED[cfg.name] = LOADED.get(cfg.name) or honest(cfg, device)
        return LOADED[cfg.name]

    monkeypatch.setattr(opening, "load_language_model", load)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory, tiny_text_file: Path) -> Path:
    """The first 60 of the tiny text's documents, some 5,000 tokens."""
    path = tmp_path_factory.mktemp("text") / "short.jsonl"
    path.write_text("\n".join(tiny_text_file.read_text().splitlines()[:60]))
    return path


@pytest.fixture
def cfg(tmp_path: Path, tiny_lm_folder: Path, text_file: Path) -> Config:
    return configured(tmp_path / "shards", tiny_lm_folder, text_file)


@pytest.fixture
def again(tmp_path: Path, tiny_lm_folder: Path, text_file: Path):
    """Return a function that gives the same configuration with changes."""

    def make(**changed: object) -> Config:
        folder = changed.pop("folder", tmp_path / "shards")
        assert isinstance(folder, Path)
        return configured(folder, tiny_lm_folder, text_file, **changed)

    return make


def harvested(cfg: Config) -> tuple[Path, str]:
    """Harvest and return the folder and all that was said."""
    said: list[str] = []
    folder = harvest(cfg, say=said.append)
    return folder, "\n".join(said)


def live(cfg: Config, hookpoint: Hookpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows and tokens that the model gives in one pass over the training text."""
    opened = opening.open_model(cfg, torch.device("cpu"))
    rows, tokens = [], []
    for batch in opened.contexts("train").batches(cfg.stream.sequences_per_forward):
        captured = capture(opened.lm.module, [hookpoint], batch.tokens)[hookpoint]
        rows.append(captured[batch.is_kept])
        tokens.append(batch.tokens[batch.is_kept])
    return torch.cat(rows), torch.cat(tokens)


def on_disk(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens = [], []
    for entry in read_complete(folder).shards:
        file = ShardFile(folder, entry)
        for piece in range(entry.pieces):
            contexts = file.contexts(piece)
            rows.append(file.rows(piece, name))
            tokens.append(contexts.tokens[contexts.is_kept])
    return torch.cat(rows), torch.cat(tokens)


def test_shards_hold_what_the_model_computes_row_by_row(again):
    cfg = again(harvest__tokens=None, harvest__shard_tokens=2000)
    folder, said = harvested(cfg)
    manifest = read_complete(folder)
    assert manifest.names == ("model.layers.1", "model.layers.2.mlp:in")
    assert manifest.end == "text"
    for hookpoint in HOOKPOINTS:
        expected, tokens = live(cfg, hookpoint)
        rows, kept_tokens = on_disk(folder, str(hookpoint))
        assert torch.equal(rows, expected)
        assert torch.equal(kept_tokens, tokens)
    assert manifest.rows == len(expected)
    assert f"{manifest.rows:,} tokens in {len(manifest.shards)} shards" in said
    assert "ended before" not in said


def test_a_shard_is_a_whole_number_of_passes_of_at_least_shard_tokens(cfg: Config):
    folder, _ = harvested(cfg)
    *full, last = Manifest.read(folder).shards
    assert len(full) > 5
    assert all(300 <= shard.rows < 300 + 4 * 31 for shard in full)
    assert 0 < last.rows < 300 + 4 * 31


def test_a_harvest_ends_at_its_tokens_with_whole_contexts(again):
    for tokens in (3000, 2999, 31, 4 * 31):
        folder, _ = harvested(again(harvest__tokens=tokens))
        manifest = read_complete(folder)
        assert tokens - 31 < manifest.rows <= tokens
        assert manifest.end == "tokens"
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="at least a context's"):
        harvested(again(harvest__tokens=5))


@pytest.mark.parametrize(
    ("room", "n", "is_last"),
    [(None, 3, False), (9, 3, False), (8, 3, True), (7, 2, True), (2, 0, True)],
)
def test_contexts_are_taken_while_they_fit(room: int | None, n: int, is_last: bool):
    is_kept = torch.arange(4) < torch.tensor([3, 2, 3])[:, None]
    tokens = torch.arange(12).reshape(3, 4)
    cut, ended = harvesting._within(Contexts(tokens, tokens, is_kept), room)
    assert torch.equal(cut.tokens, tokens[:n])
    assert len(cut.is_kept) == len(cut.document_ids) == n
    assert ended == is_last


def test_text_that_ends_early_is_told_and_the_folder_is_complete(again):
    folder, said = harvested(again(harvest__tokens=10**7, harvest__shard_tokens=5000))
    manifest = read_complete(folder)
    assert "ended before the 10,000,000 tokens that were asked for" in said
    assert f"{folder} holds {manifest.rows:,} tokens" in said
    assert len(ShardRows(folder).next_block().documents)


def test_a_narrower_dtype_is_stored(again):
    folder, _ = harvested(again(stream__dtype="bfloat16"))
    plain, _ = harvested(again(folder=Path(f"{folder}2")))
    for name in Manifest.read(folder).names:
        rows = on_disk(folder, name)[0]
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows, on_disk(plain, name)[0].bfloat16())


def test_training_reads_what_was_harvested(again):
    folder, _ = harvested(again())
    cfg = again(stream__shards=str(folder), model__hookpoint="model.layers.1")
    rows = open_shards(cfg, seed=1)
    block = rows.next_block()
    disk = on_disk(folder, "model.layers.1")[0]
    assert (disk == block.rows[0][0]).all(1).any()
    assert rows.metadata()["hook_name"] == "model.layers.1"
    with pytest.raises(ValueError, match=r"data.context_size was 32, now 24"):
        open_shards(again(stream__shards=str(folder), data__context_size=24), seed=1)


# --- Killed and continued.


def test_killed_at_any_write_and_at_random_it_ends_in_the_same_bytes(again, tmp_path: Path):
    cfg = again(harvest__tokens=1500)
    folder, _ = harvested(cfg)
    (tmp_path / "cfg.yaml").write_text(to_yaml(cfg))
    script = Path(__file__).parent / "harvest_cases.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "cfg.yaml", tmp_path / "killed", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    n_killed, n_places = map(int, done.stdout.split())
    assert n_killed >= 5
    assert n_places >= 3
    assert contents(tmp_path / "killed") == contents(folder)
    assert contents(tmp_path / "killed.first") == contents(folder)


@pytest.mark.parametrize("tokens", [None, 3000, 2 * 300])
def test_a_harvest_cut_anywhere_continues_to_the_same_bytes(again, tokens: int | None):
    """As if killed between any two shards, the last ones too."""
    cfg = again(harvest__tokens=tokens, harvest__shard_tokens=900 if tokens is None else 300)
    folder, _ = harvested(cfg)
    whole, manifest = contents(folder), Manifest.read(folder)
    for n in {0, 1, 2, len(manifest.shards) - 1, len(manifest.shards)}:
        end = manifest.end if n == len(manifest.shards) and manifest.end == "tokens" else None
        Manifest(manifest.identity, manifest.shards[:n], end).write(folder)
        (folder / shard_files.PARTIAL).write_bytes(b"half")
        (folder / f".{MANIFEST}.partial").write_bytes(b"half")
        (folder / "0123456789abcdef.safetensors").write_bytes(b"not listed yet")
        _, said = harvested(cfg)
        assert contents(folder) == whole
        assert ("Continuing behind" in said) == (n > 0)


def test_a_finished_harvest_runs_no_model_and_changes_nothing(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = harvested(cfg)
    whole = contents(folder)
    honest = reader.Reader.read

    def for_width_only(self, tokens):
        assert tokens.numel() == 2, "the model ran"
        return honest(self, tokens)

    monkeypatch.setattr(reader.Reader, "read", for_width_only)
    _, said = harvested(cfg)
    assert contents(folder) == whole
    assert "holds" in said


def test_only_damaged_and_missing_shards_are_made_again(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = harvested(cfg)
    whole, shards = contents(folder), Manifest.read(folder).shards
    written: list[str] = []
    honest = harvesting.ShardWriter._write

    def noting(self, index, draft):
        written.append(self.manifest.shards[index].file)
        return honest(self, index, draft)

    monkeypatch.setattr(harvesting.ShardWriter, "_write", noting)
    cut, flipped, missing = (folder / shards[i].file for i in (1, 3, len(shards) - 1))
    os.truncate(cut, 100)
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    missing.unlink()
    _, said = harvested(cfg)
    assert contents(folder) == whole
    assert written == [cut.name, flipped.name, missing.name]
    assert all(f"{name} is missing or damaged" in said for name in written)
    statistics = Manifest.read(folder).statistics
    assert statistics is not None
    (folder / statistics["file"]).write_bytes(b"")
    harvested(cfg)
    assert contents(folder) == whole


# --- refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__context_size": 24}, "data.context_size was 32, now 24"),
        ({"data__mask": ("special",)}, r"data.mask was \['bos', 'first', 'special'\], now"),
        ({"model__hookpoint": "model.layers.1"}, "model.hookpoint was"),
        ({"stream__dtype": "bfloat16"}, "dtype was 'float32', now 'bfloat16'"),
        ({"stream__sequences_per_forward": 5}, "stream.sequences_per_forward was 4, now 5"),
        ({"harvest__tokens": 2000}, "harvest.tokens was 3000, now 2000"),
        ({"harvest__shard_tokens": 301}, "harvest.shard_tokens was 300, now 301"),
        ({"run__seed": 1}, "run.seed was 0, now 1"),
    ],
)
def test_another_harvest_is_refused_by_the_field_that_differs(again, changed, message: str):
    folder, _ = harvested(again())
    whole = contents(folder)
    with pytest.raises(ValueError, match=message) as raised:
        harvested(again(**changed))
    assert "another `--harvest.folder`" in str(raised.value)
    assert contents(folder) == whole


def test_another_model_or_text_of_the_same_name_is_refused(
    again, tmp_path: Path, tiny_lm_folder: Path, text_file: Path
):
    copy, text = tmp_path / "lm", tmp_path / "text.jsonl"
    shutil.copytree(tiny_lm_folder, copy)
    shutil.copy(text_file, text)
    changed = {"model__name": str(copy), "data__source": str(text)}
    harvested(again(**changed))
    lines = text.read_text().splitlines()
    text.write_text("\n".join([lines[0].replace("the", "thee"), *lines[1:]]))
    with pytest.raises(ValueError, match=r"data.text was"):
        harvested(again(**changed))
    shutil.copy(text_file, text)
    config = (copy / "config.json").read_text()
    changed_config = config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    (copy / "config.json").write_text(changed_config)
    LOADED.clear()
    with pytest.raises(ValueError, match=r"model.config was"):
        harvested(again(**changed))


def test_a_folder_with_other_files_is_refused(cfg: Config, tmp_path: Path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        harvested(cfg)
    assert contents(tmp_path / "shards") == {"mine.txt": b"x"}


def test_a_disk_too_small_is_refused_before_the_model_runs(
    again, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = harvested(again(folder=tmp_path / "whole"))
    size = sum(map(len, contents(folder).values()))
    monkeypatch.setattr(harvest_size.shutil, "disk_usage", lambda _: Usage(0, 0, size // 2))
    with monkeypatch.context() as patch:
        patch.setattr(harvesting, "_Harvest", None)
        with pytest.raises(RuntimeError, match=r"a disk with .* free; .* has .*harvest.tokens"):
            harvested(again())
    assert not (tmp_path / "shards").exists()
    # What is there already needs no room.
    monkeypatch.setattr(harvest_size.shutil, "disk_usage", lambda _: Usage(0, 0, size // 10))
    manifest = Manifest.read(folder)
    Manifest(manifest.identity, manifest.shards[:-1]).write(folder)
    harvested(again(folder=tmp_path / "whole"))


def test_sizes_are_told_before_and_are_right(again):
    folder, said = harvested(again(harvest__tokens=None, harvest__shard_tokens=10**6))
    manifest = Manifest.read(folder)
    per_token = token_bytes((32, 32), torch.float32)
    assert per_token == 2 * 32 * 4 + 13
    assert f"{per_token} bytes a token, {per_token:.1f} MB per million tokens" in said
    assert manifest.bytes == pytest.approx(per_token * manifest.rows, rel=0.06)
    told = int(said.split("about ")[1].split(" tokens")[0].replace(",", ""))
    assert told == pytest.approx(manifest.rows, rel=0.15)
    assert str(Size(4, 10**6)) == (
        "4 bytes a token, 4.0 MB per million tokens; about 1,000,000 tokens, 4.0 MB in all"
    )
    assert [readable(n) for n in (1, 2e6, 3e9, 4.55e12)] == ["0.0 kB", "2.0 MB", "3.0 GB", "4.5 TB"]


def test_streamed_text_needs_a_number_of_tokens(again, monkeypatch: pytest.MonkeyPatch):
    from sae.stream.documents import StreamedDocuments

    rows = StreamedDocuments(None, "text", "hub/set")
    monkeypatch.setattr(opening, "open_documents", lambda _: rows)
    with pytest.raises(ValueError, match=r"`harvest.tokens` must say"):
        harvested(again(harvest__tokens=None))


def test_several_processes_are_refused(cfg: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="must run as one process"):
        harvested(cfg)


def test_activations_that_are_not_finite_stop_it(cfg: Config, monkeypatch: pytest.MonkeyPatch):
    honest, calls = reader.capture, []

    def broken(module, hookpoints, tokens):
        captured = honest(module, hookpoints, tokens)
        calls.append(1)
        if len(calls) == 20:
            captured[hookpoints[1]][:, 5, 3] = float("nan")
        return captured

    monkeypatch.setattr(reader, "capture", broken)
    with pytest.raises(NonFiniteActivationsError, match=r"`model.layers.2.mlp:in`"):
        harvested(cfg)
    folder = Path(cfg.harvest.folder or "")
    manifest = Manifest.read(folder)
    assert manifest.shards
    assert not manifest.is_complete
    assert {path.name for path in folder.iterdir()} <= manifest.files | {MANIFEST}


# --- the command line


def test_the_verb_writes_to_the_named_folder_and_says_how_to_go_on(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    tree = {
        "model": {"name": cfg.model.name, "hookpoint": "model.layers.1"},
        "data": {"source": cfg.data.source, "context_size": 32},
        "harvest": {"tokens": 1000},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    main(["harvest", "mine.yaml"])
    assert read_complete(tmp_path / "shards/mine").rows <= 1000
    assert "--stream.shards shards/mine" in capsys.readouterr().out
    main(["harvest", "mine.yaml", "--harvest.folder", "other", "--harvest.shard_tokens", "200"])
    assert len(read_complete(tmp_path / "other").shards) == 2
    assert len(read_complete(tmp_path / "shards/mine").shards) == 1
    with pytest.raises(SystemExit) as stopped:
        main(["harvest", "mine.yaml", "--data.context_size", "16"])
    assert stopped.value.code == 2
    assert "data.context_size was 32, now 16" in capsys.readouterr().err


def test_names_are_chosen_by_pattern():
    names = ("model.layers.0", "model.layers.1", "model.layers.1:in", "model.layers.1.mlp")
    assert choose_names("model.layers.*", names) == names[:2]
    assert choose_names("layers.1.mlp, layers.1:in", names) == names[2:]
    assert choose_names("", names) == names
    with pytest.raises(ValueError, match=r"got 'layers.9'"):
        choose_names("layers.0, layers.9", names)
