from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stream_stand_ins import HubRows

from sae.config import DataConfig
from sae.stream.content import Content, DocumentColumn, content_bytes, messages_of
from sae.stream.documents import (
    LocalDocuments,
    StreamedDocuments,
    is_held_out,
    open_documents,
    visit_part,
)

TEXTS = ["one\nline", "  ", "zwei, mit Komma", "", "x" * 200_000]
KEPT = [text for text in TEXTS if text.strip()]


def _write_txt(path: Path) -> None:
    path.write_text("\n\n\n".join(TEXTS), encoding="utf-8")


def _write_jsonl(path: Path) -> None:
    rows = [json.dumps({"id": 1, "content": text}) for text in [*TEXTS, None]]
    path.write_text("\n".join(rows) + "\n\n", encoding="utf-8")


def _write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["prompt", "target"], *([text, 1] for text in TEXTS)])


def _write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [*TEXTS, None], "id": range(6)}), path)


WRITERS = {
    ".txt": _write_txt,
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def open_texts(source: object, **options: Any) -> list[str]:
    documents = open_documents(DataConfig(source=str(source), **options))
    assert isinstance(documents, LocalDocuments)
    return [str(content) for content in documents.contents]


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_of_each_format(tmp_path: Path, suffix: str) -> None:
    limit = csv.field_size_limit()
    WRITERS[suffix](tmp_path / f"a{suffix}")
    assert open_texts(tmp_path / f"a{suffix}") == KEPT
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("suffix", WRITERS)
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    plain = tmp_path / f"a{suffix}"
    WRITERS[suffix](plain)
    packed = tmp_path / f"b{suffix}.zst"
    packed.write_bytes(zstandard.compress(plain.read_bytes()))
    assert open_texts(packed) == KEPT


def test_a_glob_reads_all_its_files_in_order(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n\n{name}2")
    assert open_texts(tmp_path / "*.txt") == ["a1", "a2", "b1", "b2", "c1", "c2"]


def test_a_lone_surrogate_is_replaced_as_no_tokenizer_takes_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert open_texts(tmp_path / "a.jsonl") == ["a?b"]
    assert is_held_out("a\ud800b", 1.0)


def test_a_subset_of_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"`data\.subset`"):
        open_texts(tmp_path / "a.txt", subset="en")


@pytest.mark.demo
def test_the_demo_text() -> None:
    pytest.importorskip("zstandard")
    if find_spec("sae_probes") is None:
        pytest.skip("needs the package sae-probes")
    texts = open_texts("package:sae-probes", subset="100_news_fake*,161_agnews_0*")
    assert len(texts) > 5000
    assert sum(map(len, texts)) > 10_000_000


def test_the_column_is_taken_where_given(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "b", "text": "t"}')
    assert open_texts(path) == ["t"]
    assert open_texts(path, column="body") == ["b"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_missing_column_lists_those_there(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match=r"`data\.column`.*'body'.*(text|content|prompt)"):
        open_texts(tmp_path / f"a{suffix}", column="body")


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "saved"))
    documents = open_documents(DataConfig(source=str(tmp_path / "saved")))
    visited = [str(document.content) for document in documents.visit(seed=0, epoch=0)]
    assert sorted(visited) == sorted(KEPT)
    with pytest.raises(ValueError, match=r"`data\.split`.*'test'.*train"):
        open_documents(DataConfig(source=str(tmp_path / "saved"), split="test"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text"', "a.jsonl.*JSONDecodeError"),
        ("a.jsonl", b'{"text": 3}', "line 1.*holds int, not text.*: 3"),
        ("a.jsonl", b"[1]", "holds list"),
        ("a.txt", b"\xff\xfe\xff", "a.txt.*UnicodeDecodeError"),
        ("a.parquet", b"PAR1", "a.parquet.*Arrow"),
        ("a.txt", b" \n\n \n", "at least one document"),
        ("a.csv", b"", r"`data\.column`"),
        ("a.pdf", b"%PDF", r"must end in \.txt"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_texts(tmp_path / name)


def test_truncated_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress(json.dumps({"text": "a" * 9}).encode())
    (tmp_path / "a.jsonl.zst").write_bytes(b"junk" + packed)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst.*ZstdError"):
        open_texts(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("source", ["", "no/such/file.jsonl", "nothing-*.txt", "./folder/x"])
def test_bad_sources(source: str) -> None:
    with pytest.raises(ValueError, match=r"`data\.source`"):
        open_documents(DataConfig(source=source))


def test_a_folder_without_dataset_suggests_a_glob(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\*\.jsonl"):
        open_documents(DataConfig(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConnectionError("no route"), RuntimeError, "hub could not be reached.*no route"),
        (FileNotFoundError("doesn't exist"), ValueError, "must name a dataset.*doesn't exist"),
        (ValueError("Config name is missing"), ValueError, r"`data\.subset`.*Config name"),
    ],
)
def test_hub_errors(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(kind, match=message):
        open_documents(DataConfig(source="someone/texts"))


def test_hub_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(*args: object, **options: object) -> HubRows:
        asked.append((args, options))
        return HubRows([["a", "", "b"], ["c", "d", "e"]])

    monkeypatch.setattr("datasets.load_dataset", load)
    documents = open_documents(DataConfig(source="someone/texts", subset="en", split="test"))
    assert asked == [(("someone/texts", "en"), {"split": "test", "streaming": True})]
    assert isinstance(documents, StreamedDocuments)
    assert {str(d.content) for d in documents.visit(seed=0, epoch=0)} == set("abcde")


def _local(n: int) -> LocalDocuments:
    return LocalDocuments([f"text {i}" for i in range(n)], "texts")


def _streamed(n: int) -> StreamedDocuments:
    texts = [f"text {i}" for i in range(n)]
    return StreamedDocuments(HubRows([texts[: n // 2], texts[n // 2 :]]), "content", "texts")


@pytest.mark.parametrize("make", [_local, _streamed])
@given(
    n=st.integers(0, 40),
    world_size=st.integers(1, 5),
    start=st.integers(0, 45),
    epoch=st.integers(0, 3),
)
def test_ranks_share_each_epoch_without_overlap_or_loss(
    make: Callable[[int], Any], n: int, world_size: int, start: int, epoch: int
) -> None:
    documents = make(n)
    whole = list(documents.visit(seed=3, epoch=epoch))
    assert sorted(str(d.content) for d in whole) == sorted(f"text {i}" for i in range(n))
    shares = []
    for rank in range(world_size):
        place = {"seed": 3, "epoch": epoch, "rank": rank, "world_size": world_size}
        share = list(documents.visit(**place))
        resumed = list(documents.visit(**place, start=start))
        assert resumed == [document for document in share if document.place >= start]
        shares.append(share)
    assert sorted((d for share in shares for d in share), key=lambda d: d.place) == whole
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_order_is_fixed_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [d.index for d in _local(50).visit(seed=seed, epoch=epoch)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4
    assert order(0, 0) != sorted(order(0, 0))


@given(texts=st.lists(st.text(max_size=5)), fraction=st.floats(0.01, 0.99))
def test_train_and_held_out_are_disjoint_and_complete(texts: list[str], fraction: float) -> None:
    documents = LocalDocuments(texts, "texts")
    train, held_out = (
        [str(d.content) for d in visit_part(documents, part, fraction, seed=0, epoch=0)]
        for part in ("train", "held_out")
    )
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(text for text in texts if text.strip())


def test_held_out_share_is_the_fraction() -> None:
    share = sum(is_held_out(f"text {i}", 0.1) for i in range(20_000)) / 20_000
    assert share == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 20_000) ** 0.5)


@given(text=st.text(), a=st.floats(0, 1), b=st.floats(0, 1))
def test_a_larger_fraction_only_adds_held_out_documents(text: str, a: float, b: float) -> None:
    assert is_held_out(text, min(a, b)) <= is_held_out(text, max(a, b))


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe?"},
    {"role": "assistant", "content": "7"},
]
SHAREGPT = [
    {"from": role, "value": message["content"]}
    for role, message in zip(("system", "human", "gpt"), TALK, strict=True)
]
IDS = [[5, 0, 299], [7], [], [2**31 - 1] * 40]
KEPT_IDS = [ids for ids in IDS if ids]


def read_chat(value: Any) -> Content:
    return DocumentColumn("chat").read(value, "row 3")


def write_rows(path: Path, column: str, rows: list[Any]) -> str:
    """Write a column in the format that the name says; a name without suffix is a saved folder."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({column: row, "id": 1}) for row in rows))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"id": [1] * len(rows), column: rows}), path)
    else:
        table = datasets.Dataset.from_dict({column: rows})
        table.with_format("numpy").save_to_disk(str(path))
    return str(path)


def contents_of(source: str, **options: Any) -> list[Content]:
    documents = open_documents(DataConfig(source=source, **options))
    visited = sorted(documents.visit(seed=0, epoch=0), key=lambda document: document.index)
    return [document.content for document in visited]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
@pytest.mark.parametrize("column", ["messages", "conversations", "talk"])
def test_conversations_of_each_format(tmp_path: Path, name: str, column: str) -> None:
    rows = [TALK, None, [], TALK[1:]]
    source = write_rows(tmp_path / name, column, rows)
    given = {"column": "talk"} if column == "talk" else {}
    contents = contents_of(source, content="chat", **given)
    assert [messages_of(content) for content in contents] == [TALK, TALK[1:]]


def test_a_conversation_is_one_text_however_it_is_written() -> None:
    expected = read_chat(TALK)
    assert isinstance(expected, str)
    filled = [{**message, "tool_calls": None} for message in TALK]
    for same in (filled, SHAREGPT):
        assert read_chat(same) == expected
    named = [{**message, "name": "N", "weight": 1} for message in TALK]
    turned = [dict(reversed(message.items())) for message in named]
    assert read_chat(turned) == read_chat(named) != expected
    assert read_chat(TALK[1:]) != expected
    silent = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert messages_of(read_chat(silent)) == [{**silent[0], "content": ""}]


@pytest.mark.parametrize(
    "value",
    [
        "text",
        {"role": "user", "content": "a"},
        ["a"],
        [{"role": "user"}],
        [{"content": "a"}],
        [{"role": 1, "content": "a"}],
        [*TALK, {"role": "user", "content": [{"type": "image"}]}],
    ],
)
def test_what_is_no_conversation_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"row 3 holds (str|dict|list), not a list of messages"):
        read_chat(value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
@pytest.mark.parametrize("column", ["input_ids", "tokens", "ids"])
def test_token_ids_of_each_format(tmp_path: Path, name: str, column: str) -> None:
    source = write_rows(tmp_path / name, column, IDS)
    given = {"column": "ids"} if column == "ids" else {}
    contents = contents_of(source, content="tokens", **given)
    assert contents == [array("i", ids) for ids in KEPT_IDS]


@pytest.mark.parametrize("value", ["text", 3, [1.5], ["1"], [2**31], [[1]], [None]])
def test_what_is_no_list_of_token_ids_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"row 3 holds (str|int|list), not a list of token ids"):
        DocumentColumn("tokens").read(value, "row 3")


@pytest.mark.parametrize("content", ["chat", "tokens"])
def test_wrong_content_names_file_row_and_setting(tmp_path: Path, content: Any) -> None:
    rows = {"chat": [TALK, [{"role": "user"}]], "tokens": [[1], [1.5]]}[content]
    source = write_rows(tmp_path / "a.jsonl", "mine", rows)
    with pytest.raises(ValueError, match=rf"a\.jsonl.*line 2, 'mine' holds.*is '{content}'"):
        contents_of(source, content=content, column="mine")
    with pytest.raises(ValueError, match=r"`data\.column`.*got None.*mine, id.*`data\.content`"):
        contents_of(source, content=content)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt.*\.txt file holds text"):
        contents_of(str(tmp_path / "a.txt"), content=content)
    saved = write_rows(tmp_path / "saved", "mine", [["text"]])
    with pytest.raises(ValueError, match=r"row 0 of '.*saved', 'mine', holds list"):
        contents_of(saved, content=content, column="mine")


@pytest.mark.parametrize(
    ("content", "column", "rows"),
    [("chat", "messages", [TALK, [], SHAREGPT]), ("tokens", "tokens", IDS)],
)
def test_hub_datasets_of_each_content(
    monkeypatch: pytest.MonkeyPatch, content: Any, column: str, rows: list[Any]
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: HubRows([rows], column))
    found = contents_of("someone/texts", content=content)
    read = [DocumentColumn(content).read(row, "here") for row in rows if row]
    assert found == read
    assert len(found) == len(rows) - 1
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: HubRows([["a"]], column))
    with pytest.raises(ValueError, match=rf"row 0 of 'someone/texts', '{column}', holds str"):
        contents_of("someone/texts", content=content)


@given(ids=st.lists(st.integers(0, 2**31 - 1), min_size=1), fraction=st.floats(0, 1))
def test_token_ids_are_split_by_their_values(ids: list[int], fraction: float) -> None:
    on_side = is_held_out(array("i", ids), fraction)
    assert is_held_out(ids, fraction) == is_held_out(tuple(ids), fraction) == on_side
    assert content_bytes([1, 258]) == bytes([1, 0, 0, 0, 2, 1, 0, 0])
    assert not is_held_out(ids, 0)
    assert is_held_out(ids, 1)


def test_held_out_share_of_token_ids_is_the_fraction() -> None:
    share = sum(is_held_out(array("i", [i, 0]), 0.1) for i in range(20_000)) / 20_000
    assert share == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 20_000) ** 0.5)
