"""Shards: what is written is read, in an order that the seed fixes, or damage is named."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from shard_cases import NAMES, WIDTHS, T, all_ids, batch, write_harvest
from toy_rows import assert_resumes_exactly, buffered

from sae.config import Config
from sae.configuration import from_flat
from sae.stream import shard_files, shards
from sae.stream.arrays import open_source
from sae.stream.buffered import BufferedSource
from sae.stream.manifest import MANIFEST, Manifest, read_complete
from sae.stream.moments import Moments, merged
from sae.stream.prefetch import Prefetched
from sae.stream.rows import Block
from sae.stream.shard_files import DamagedShardError, ShardFile, checksum, is_intact, split_pieces
from sae.stream.shard_writer import ShardWriter, open_folder, read_moments
from sae.stream.shards import ShardRows, open_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_harvest(tmp_path / "shards")
    return tmp_path / "shards"


def ids(block: Block) -> list[int]:
    return block.rows[0][:, 0].int().tolist()


def take(rows: ShardRows, n: int) -> list[list[int]]:
    return [ids(rows.next_block()) for _ in range(n)]


def n_pieces(folder: Path) -> int:
    return sum(shard.pieces for shard in Manifest.read(folder).shards)


def epoch_of(rows: ShardRows, n: int) -> list[int]:
    return [i for block in take(rows, n) for i in block]


# --- one shard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_shard_is_a_safetensors_file_named_by_its_content(tmp_path: Path, dtype: torch.dtype):
    manifest = write_harvest(tmp_path, shards=2, dtype=dtype)
    assert len(manifest.shards) == 2
    for index, entry in enumerate(manifest.shards):
        path = tmp_path / entry.file
        assert path.stem == entry.name
        tensors = load_file(path)
        expected = [batch((3 * index + i) * 4 * T, 4, dtype) for i in range(3)]
        for place, name in enumerate(NAMES):
            rows = torch.cat([rows[place] for _, rows in expected])
            assert torch.equal(tensors[f"activations.{name}"], rows)
            assert tensors[f"activations.{name}"].dtype == dtype
        for field in ("tokens", "document_ids", "is_kept"):
            whole = torch.cat([getattr(contexts, field) for contexts, _ in expected])
            assert torch.equal(tensors[field].long(), whole.long())
        file = ShardFile(tmp_path, entry)
        contexts = file.contexts(1)
        assert torch.equal(
            file.rows(1, NAMES[0])[:, 0], contexts.tokens[contexts.is_kept].to(dtype)
        )


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    piece_rows=st.integers(1, 9),
)
@settings(max_examples=80, deadline=None)
def test_pieces_hold_every_row_once_and_are_never_empty(counts: list[int], piece_rows: int):
    is_kept = torch.arange(4) < torch.tensor(counts)[:, None]
    tokens = torch.arange(4 * len(counts)).reshape(-1, 4)
    rows = tokens[is_kept].float()[:, None]
    before, shard_files.PIECE_BYTES = shard_files.PIECE_BYTES, piece_rows * 4
    try:
        pieces = split_pieces(shard_files.Contexts(tokens, tokens, is_kept), (rows,))
    finally:
        shard_files.PIECE_BYTES = before
    if not sum(counts):
        assert pieces == []
        return
    assert torch.equal(torch.cat([p.rows[0] for p in pieces]), rows)
    assert torch.equal(torch.cat([p.contexts.tokens for p in pieces]), tokens)
    for piece in pieces:
        assert 0 < len(piece.rows[0]) < piece_rows + 4
        assert int(piece.contexts.is_kept.sum()) == len(piece.rows[0])


@given(data=st.binary(min_size=1, max_size=300), bit=st.integers(0, 10**6))
@settings(deadline=None)
def test_a_checksum_shows_any_flipped_bit(data: bytes, bit: int):
    flipped = bytearray(data)
    flipped[(bit // 8) % len(data)] ^= 1 << bit % 8
    one, other = (torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in (data, flipped))
    assert checksum(one) == checksum(one.clone())
    assert checksum(one) != checksum(other)


@pytest.mark.parametrize(("start", "n"), [(0, 8192), (2, 2), (0, 100), (8190, 4)])
def test_a_checksum_shows_what_changed_places(start: int, n: int):
    rows = torch.randn(5 * 8192, 1, generator=torch.Generator().manual_seed(0))
    swapped = rows.clone()
    swapped[start : start + n], swapped[start + n : start + 2 * n] = (
        rows[start + n : start + 2 * n],
        rows[start : start + n],
    )
    assert checksum(rows) != checksum(swapped)


def test_a_checksum_shows_the_highest_bit_of_every_word():
    """An even weight would lose it."""
    rows = torch.zeros(2, 2 * 4096, dtype=torch.int64)
    nothing = checksum(rows)
    for word in (0, 1, 2, 4095, 4096, 4097, 8192):
        rows.view(-1)[word] = -(2**63)
        assert checksum(rows) != nothing
        rows.view(-1)[word] = 0


def test_a_checksum_shows_flips_that_cancel_in_a_sum():
    rows = torch.zeros(4096, 2, dtype=torch.int32)
    rows[7, 0] = 1
    other = torch.zeros_like(rows)
    other[9, 0] = 1
    assert checksum(rows) != checksum(other)


# --- the stream


def test_an_epoch_is_every_row_once_in_a_new_order_of_shards(folder: Path):
    rows = ShardRows(folder, seed=1)
    n = n_pieces(folder)
    first, second = epoch_of(rows, n), epoch_of(rows, n)
    assert sorted(first) == sorted(second) == all_ids()
    assert first != second
    assert (rows.epoch, rows.widths, rows.names) == (1, WIDTHS, NAMES)
    # Sequential inside a shard: the order changes only between shards.
    per_shard = len(all_ids()) // 4
    for epoch in (first, second):
        for start in range(0, len(epoch), per_shard):
            assert epoch[start : start + per_shard] == sorted(epoch[start : start + per_shard])
    other_seed = epoch_of(ShardRows(folder, seed=2), n)
    assert other_seed != first
    assert epoch_of(ShardRows(folder, seed=1), n) == first


def test_rows_of_all_hookpoints_and_documents_belong_together(folder: Path):
    rows = ShardRows(folder)
    for _ in range(5):
        block = rows.next_block()
        token = block.rows[0][:, 0]
        assert torch.equal(block.rows[1][:, 4], token + 4000)
        assert torch.equal(block.documents, token.long() // 9)
    only = ShardRows(folder, [NAMES[1]])
    assert only.widths == (5,)
    assert torch.equal(only.next_block().rows[0], ShardRows(folder).next_block().rows[1])
    with pytest.raises(ValueError, match=r"among those of .*model.layers.0, .*got 'other'"):
        ShardRows(folder, ["other"])


@given(n_lanes=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_lanes_divide_every_epoch_without_overlap_or_loss(
    tmp_path_factory: pytest.TempPathFactory, n_lanes: int, seed: int
):
    folder = tmp_path_factory.mktemp("lanes")
    write_harvest(folder, shards=3, batches=2)
    n = n_pieces(folder)
    per_lane = [len(range(lane, n, n_lanes)) for lane in range(n_lanes)]
    lanes = [ShardRows(folder, seed=seed, lane=lane, n_lanes=n_lanes) for lane in range(n_lanes)]
    for epoch in range(2):
        parts = [epoch_of(rows, k) for rows, k in zip(lanes, per_lane, strict=True)]
        assert sorted(i for part in parts for i in part) == all_ids(3, 2)
        assert {rows.epoch for rows in lanes} == {epoch}


def test_more_lanes_than_pieces_are_refused(folder: Path):
    with pytest.raises(ValueError, match=r"a piece for each of 1000 lanes; it holds \d+"):
        ShardRows(folder, n_lanes=1000)


def test_resume_at_any_block_is_exact(folder: Path):
    n = n_pieces(folder) // 2
    whole = take(ShardRows(folder, seed=3, lane=1, n_lanes=2), 2 * n + 3)
    for stop in range(2 * n + 1):
        rows = ShardRows(folder, seed=3, lane=1, n_lanes=2)
        take(rows, stop)
        state = rows.state_dict()
        again = ShardRows(folder, seed=3, lane=1, n_lanes=2)
        take(again, stop % 3)  # wherever it stood before
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert again.epoch == max(0, stop - 1) // n
        assert take(again, 2) == whole[stop : stop + 2]


def test_a_place_in_other_shards_is_refused(folder: Path, tmp_path: Path):
    state = ShardRows(folder, seed=3).state_dict()
    with pytest.raises(ValueError, match="seed was 3, now 4"):
        ShardRows(folder, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="hookpoints was"):
        ShardRows(folder, NAMES[:1], seed=3).load_state_dict(state)
    write_harvest(tmp_path / "other", shards=3)
    with pytest.raises(ValueError, match="shards was"):
        ShardRows(tmp_path / "other", seed=3).load_state_dict(state)


def test_a_sample_is_spread_over_all_shards_and_moves_nothing(folder: Path):
    rows, plain = ShardRows(folder, seed=5), ShardRows(folder, seed=5)
    rows.next_block()
    plain.next_block()
    sample = rows.sample()
    per_shard = torch.tensor(ids(sample)) // (3 * 4 * T)
    assert set(per_shard.tolist()) == {0, 1, 2, 3}
    assert len(set(ids(sample))) == len(sample.documents) == len(sample.rows[1])
    assert take(rows, 9) == take(plain, 9)
    other_lane = ShardRows(folder, seed=8, lane=1, n_lanes=3).sample()
    assert torch.equal(other_lane.rows[0], sample.rows[0])


def test_a_large_sample_is_cut_evenly(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "SAMPLE_ROWS", 8)
    monkeypatch.setattr(shards, "SAMPLE_PIECES", 4)
    sample = ShardRows(folder).sample()
    assert len(sample.documents) == 8
    assert {i // (3 * 4 * T) for i in ids(sample)} == {0, 1, 2, 3}


# --- what stays in memory


def reads_of(folder: Path, monkeypatch: pytest.MonkeyPatch, resident: int) -> list[int]:
    """Return how many pieces were read from disk in each of three epochs."""
    honest, reads = ShardFile.rows, []

    def counted(self: ShardFile, *args, **kwargs):
        reads.append(1)
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(ShardFile, "rows", counted)
    monkeypatch.setattr(shards, "PIECES_AHEAD", 1)
    rows, n = ShardRows(folder, NAMES[:1], resident_tokens=resident), n_pieces(folder)
    plain, counts = ShardRows(folder, NAMES[:1]), []
    for _ in range(3):
        before = len(reads)
        epoch = epoch_of(rows, n)
        wait_until_quiet(reads)
        counts.append(len(reads) - before)
        assert epoch == epoch_of(plain, n)
        wait_until_quiet(reads)
    return counts


def wait_until_quiet(reads: list[int]) -> None:
    n = -1
    while n != len(reads):
        n = len(reads)
        time.sleep(0.02)


def test_what_fits_in_memory_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    n, ahead = n_pieces(folder), 1
    first, *later = reads_of(folder, monkeypatch, len(all_ids()))
    assert first == n
    assert later == [0, 0]
    half = reads_of(folder, monkeypatch, len(all_ids()) // 2)
    assert half[0] + half[1] + half[2] <= n + 2 * (n - n // 2 + ahead) + ahead
    assert min(half[1:]) >= n // 2 - ahead
    none = reads_of(folder, monkeypatch, 0)
    assert none[1] == none[2] == n


# --- reading ahead


@pytest.mark.parametrize("kind", [OSError, SystemExit])
def test_an_error_of_a_reader_thread_is_raised_with_its_traceback(kind: type[BaseException]):
    def reading(item: int) -> int:
        if item == 3:
            raise kind("the cable is out")
        return item * 10

    ahead = Prefetched(reading, count(), ahead=8)
    assert [next(ahead)[1] for _ in range(3)] == [0, 10, 20]  # pyright: ignore
    for _ in range(2):
        with pytest.raises(kind, match="cable") as raised:
            ahead.__next__()
        assert any(entry.name == "reading" for entry in raised.traceback)


def test_what_is_read_ahead_comes_in_order_whoever_is_faster():
    def reading(item: int) -> int:
        time.sleep(0.005 * (item % 3))
        return -item

    ahead = Prefetched(reading, count(), ahead=5, threads=4)
    assert [ahead.__next__() for _ in range(20)] == [(i, -i) for i in range(20)]


def test_reading_ahead_is_bounded_and_ends_with_its_consumer(folder: Path):
    seen: list[int] = []
    ahead = Prefetched(seen.append, count(), ahead=3)
    ahead.__next__()
    wait_until_quiet(seen)
    assert sorted(seen) == [0, 1, 2, 3]
    del ahead
    rows = ShardRows(folder)
    rows.next_block()
    rows.load_state_dict(rows.state_dict())
    rows.next_block()
    del rows
    gc.collect()
    deadline = time.monotonic() + 5
    while any(t.name.startswith("sae-prefetch") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def flip_row(path: Path) -> None:
    flip(path, path.stat().st_size - 400)


def flip_token(path: Path) -> None:
    flip(path, path.stat().st_size - 2)  # the mask stands last


def flip_header(path: Path) -> None:
    flip(path, 30)


def flip_length(path: Path) -> None:
    flip(path, 3)


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (truncate, r"it has \d+ of \d+ bytes"),
        (remove, "it is missing"),
        (flip_row, r"rows \d+ to \d+ of `model.layers"),
        (flip_token, "header, tokens or masks differ"),
        (flip_header, "header"),
        (flip_length, "header"),
        (garbage, "header"),
    ],
)
def test_a_damaged_shard_is_named_and_the_others_stay_usable(folder: Path, harm, what: str):
    entries = Manifest.read(folder).shards
    harm(folder / entries[2].file)
    assert [is_intact(folder, entry) for entry in entries] == [True, True, False, True]
    with pytest.raises(DamagedShardError, match=what) as raised:
        epoch_of(ShardRows(folder), n_pieces(folder))
    assert entries[2].file in str(raised.value)
    assert "Run the same `sae harvest` command again" in str(raised.value)
    intact = [ShardFile(folder, entries[shard]) for shard in (0, 1, 3)]
    seen = [file.rows(p, NAMES[0])[:, 0] for file in intact for p in range(file.entry.pieces)]
    assert torch.cat(seen).int().tolist() == [*all_ids()[:90], *all_ids()[135:]]


def test_a_shard_cut_while_it_is_read_is_named(folder: Path):
    entry = Manifest.read(folder).shards[0]
    file = ShardFile(folder, entry)
    truncate(folder / entry.file)
    os.truncate(folder / entry.file, entry.bytes // 2)
    with pytest.raises(DamagedShardError, match="it ends early"):
        file.rows(entry.pieces - 1, NAMES[1])


def test_a_damaged_or_foreign_manifest_is_named(folder: Path, tmp_path: Path):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"rows": 45', '"rows": 46', 1))
    with pytest.raises(ValueError, match=r"manifest.json.*checksum is another"):
        ShardRows(folder)
    (folder / MANIFEST).write_text(text[:100])
    with pytest.raises(ValueError, match=r"manifest.json.*must be JSON"):
        ShardRows(folder)
    (folder / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="must have the format 1; it has 99"):
        ShardRows(folder)
    with pytest.raises(ValueError, match=r"it has no manifest.json"):
        ShardRows(tmp_path / "nowhere")


def test_an_incomplete_harvest_is_not_trained_on(tmp_path: Path):
    whole = write_harvest(tmp_path / "shards")
    Manifest(whole.identity, whole.shards[:2]).write(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"holds 90 tokens of an unfinished.*it continues"):
        ShardRows(tmp_path / "shards")


def test_a_full_disk_in_mid_write_keeps_what_was_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest, written = os.write, []

    def filling(descriptor: int, data) -> int:
        if sum(written) > 3 * 4000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(honest(descriptor, data[:1000]))  # a disk may take less than it is given
        return written[-1]

    monkeypatch.setattr(shard_files.os, "write", filling)
    with pytest.raises(RuntimeError, match=r"the disk is full.*unharmed.*run the same command"):
        write_harvest(tmp_path)
    monkeypatch.undo()
    manifest = Manifest.read(tmp_path)
    assert 0 < len(manifest.shards) < 4
    assert all(is_intact(tmp_path, entry) for entry in manifest.shards)
    assert {path.name for path in tmp_path.iterdir()} == manifest.files | {MANIFEST}


# --- statistics


def test_moments_are_those_of_the_whole_sample_however_it_is_cut():
    generator = torch.Generator().manual_seed(0)
    x = (1e3 + torch.randn(20_011, 7, generator=generator)).float()
    whole = Moments.of(x)
    cuts = merged((Moments.of(part) for part in x.split([1, 0, 700, 9000, 10_310])), 7)
    for m in (whole, cuts):
        assert m.count == len(x)
        torch.testing.assert_close(m.mean, x.double().mean(0), rtol=1e-12, atol=0)
        variance = x.double().var(0, correction=0)
        torch.testing.assert_close(m.variance, variance, rtol=1e-10, atol=0)
        norms = x.double().norm(dim=1).mean().reshape(1)
        torch.testing.assert_close(m.mean_norm, norms, rtol=1e-12, atol=0)
    nothing = Moments.none(7).merge(Moments.none(7))
    assert nothing.count == 0
    assert nothing.variance.sum() == 0


def test_a_harvest_holds_the_moments_of_all_its_rows(folder: Path):
    manifest = read_complete(folder)
    rows = ShardRows(folder)
    blocks = [rows.next_block() for _ in range(n_pieces(folder))]
    moments = read_moments(folder, manifest)
    for place, name in enumerate(NAMES):
        x = torch.cat([block.rows[place] for block in blocks]).double()
        torch.testing.assert_close(moments[name].mean, x.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            moments[name].variance, x.var(0, correction=0), rtol=1e-10, atol=0
        )
        assert manifest.statistics is not None
        told = manifest.statistics["hookpoints"][name]
        assert told["mean_norm"] == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-12)
        total = float(x.var(0, correction=0).sum())
        assert told["total_variance"] == pytest.approx(total, rel=1e-10)
    flip(folder / manifest.statistics["file"], 100)
    with pytest.raises(DamagedShardError, match="missing or differs"):
        read_moments(folder, manifest)


# --- from a configuration, and through sae.fit


def configured(folder: Path, **changed: object) -> Config:
    flat = {
        "model.name": "tiny",
        "model.hookpoint": "layers.*",
        "data.source": "text",
        "data.context_size": T,
        "stream.shards": str(folder),
    }
    return from_flat({**flat, **{key.replace("__", "."): v for key, v in changed.items()}})


@pytest.fixture
def configured_folder(tmp_path: Path) -> Path:
    """A harvest whose manifest holds every setting that training shares with it."""
    from sae.configuration import flatten

    manifest = write_harvest(tmp_path / "shards")
    cfg = flatten(configured(tmp_path))
    keys = [k for k in cfg if k.startswith(("model.name", "model.revision", "data."))]
    shared = {k: list(cfg[k]) if isinstance(cfg[k], tuple) else cfg[k] for k in keys}
    whole = Manifest({**manifest.identity, **shared}, manifest.shards, "text", manifest.statistics)
    whole.write(tmp_path / "shards")
    return tmp_path / "shards"


def test_a_configuration_opens_its_hookpoints(configured_folder: Path):
    rows = open_shards(configured(configured_folder), seed=4, lane=1, n_lanes=2)
    assert rows.names == NAMES[:1]
    both = configured(configured_folder, model__hookpoint="model.layers.1:in, layers.0")
    assert open_shards(both, seed=4).names == NAMES
    named = configured(configured_folder, model__hookpoint="model.layers.1:in")
    opened = open_shards(named, seed=4, lane=1, n_lanes=2)
    direct = ShardRows(configured_folder, NAMES[1:], seed=4, lane=1, n_lanes=2)
    assert take(opened, 8) == take(direct, 8)
    assert opened.metadata() == {
        "model_name": "tiny",
        "hook_name": "model.layers.1:in",
        "context_size": T,
    }
    with pytest.raises(ValueError, match=r"got 'layers.7', and there are: model.layers.0"):
        open_shards(configured(configured_folder, model__hookpoint="layers.7"), seed=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model__name": "other"}, "model.name was 'tiny', now 'other'"),
        ({"model__revision": "v2"}, "model.revision was None, now 'v2'"),
        ({"data__held_out_fraction": 0.3}, "data.held_out_fraction was 0.02, now 0.3"),
        ({"data__context_size": 9}, "data.context_size was 6, now 9"),
    ],
)
def test_shards_of_another_model_or_text_are_refused(
    configured_folder: Path, changed: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        open_shards(configured(configured_folder, **changed), seed=0)


def test_resident_tokens_are_divided_among_lanes(configured_folder: Path):
    cfg = configured(configured_folder, stream__resident_tokens=100)
    assert open_shards(cfg, seed=0, lane=0, n_lanes=2).resident_tokens == 50
    assert open_shards(configured(configured_folder), seed=0).resident_tokens == 0


def test_shards_fill_a_buffer_and_resume_exactly(configured_folder: Path):
    """Over several epochs, with a norm filter, in two lanes."""

    def make() -> BufferedSource:
        cfg = configured(configured_folder)
        lanes = {i: open_shards(cfg, seed=0, lane=i, n_lanes=2) for i in range(2)}
        source = buffered(lanes, capacity=40, max_norm_ratio=1.5)
        source.calibration_rows()
        return source

    assert_resumes_exactly(make, batch=26, stops=(0, 1, 5, 6, 13, 20))
    source = make()
    rows = torch.cat([source.next_batch(26) for _ in range(9)])
    every = torch.tensor(all_ids())
    assert source.max_norm is not None
    assert rows.norm(dim=1).max() <= source.max_norm
    assert len(rows[:, 0].unique()) > 0.5 * len(every)
    none = make()
    for lane in none.lanes.values():
        lane.max_norm = 1e-9
    with pytest.raises(ValueError, match=r"data.max_norm_ratio.*Raise it"):
        none.next_batch(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_shards_is_a_matrix_for_fit(tmp_path: Path, monkeypatch, dtype: torch.dtype):
    import shard_cases

    monkeypatch.setattr(shard_cases, "NAMES", NAMES[:1])
    monkeypatch.setattr(shard_cases, "WIDTHS", WIDTHS[:1])
    write_harvest(tmp_path / "one", dtype=dtype)
    expected = torch.tensor(all_ids()).to(dtype)
    source = open_source(tmp_path / "one", seed=2)
    assert (source.widths, len(source.rows)) == ((3,), 180)
    assert torch.equal(source.rows[:][:, 0], expected)
    assert torch.equal(
        source.rows[torch.tensor([179, 0, 45, 44])][:, 0], expected[[179, 0, 45, 44]]
    )
    batch = source.next_batch(180)
    assert batch.dtype == dtype
    assert torch.equal(batch[:, 0].sort().values, expected.sort().values)
    flip_row(tmp_path / "one" / Manifest.read(tmp_path / "one").shards[1].file)
    with pytest.raises(DamagedShardError):
        open_source(tmp_path / "one")
    monkeypatch.undo()
    write_harvest(tmp_path / "two")
    with pytest.raises(ValueError, match="must hold one hookpoint to be fitted"):
        open_source(tmp_path / "two")


# --- the folder


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        open_folder(tmp_path / "mine.txt")
    assert open_folder(tmp_path / "new") is None
    assert (tmp_path / "mine.txt").read_text() == "x"


def test_a_shard_that_comes_out_otherwise_is_refused(folder: Path):
    manifest = Manifest.read(folder)
    before = {path.name for path in folder.iterdir()}
    contexts, rows = batch(7, 4, torch.float32)
    from sae.stream.shard_writer import Draft

    draft = Draft(batches=3)
    draft.add(split_pieces(contexts, rows), [Moments.of(r) for r in rows])
    with (
        pytest.raises(RuntimeError, match="must come out as it was"),
        ShardWriter(folder, manifest) as writer,
    ):
        writer.put(1, draft)
    assert {path.name for path in folder.iterdir()} == before
