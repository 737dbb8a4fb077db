"""Documents out of files: .txt, .jsonl, .csv and .parquet, each also compressed as .zst.

One document is: in .txt, what stands between blank lines; in .jsonl, one line's object; in .csv and
.parquet, one row. Where a file has columns, a `DocumentColumn` says which and what is in it;
conversations and token ids need .jsonl or .parquet. Files are read whole into memory; for more than
that use a hub dataset or a folder written by `datasets` (`sae.stream.documents`).
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sae.stream.content import Content, DocumentColumn, has_content

_BLANK_LINE = re.compile(r"\n\s*\n")


def read_text_files(paths: Sequence[Path], column: DocumentColumn) -> list[Content]:
    """Return the documents of all files, in the order of `paths`, empty ones left out.

    Raises ValueError, naming the file, where one can't be read or has no such column.
    """
    documents: list[Content] = []
    for path in paths:
        with _clear_errors(path):
            documents += filter(has_content, _read_file(path, column))
    return documents


def read_csv_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a .csv or .csv.zst file.

    Raises RuntimeError where the file is compressed and 'zstandard' is not installed.
    """
    with _open(path) as stream, _csv_rows(stream) as rows:
        return list(rows)


def has_text_suffix(path: Path) -> bool:
    """Whether the file's name says that it can be read here."""
    return path.name.lower().endswith(TEXT_SUFFIXES)


def _read_file(path: Path, column: DocumentColumn) -> Iterator[Content]:
    name = path.name.lower().removesuffix(".zst")
    read = _READERS.get(Path(name).suffix)
    if read is None:
        raise ValueError(
            f"A text file must end in {', '.join(_READERS)} or those with .zst; got `{path}`. "
            "Convert or rename it."
        )
    with _open(path) as stream:
        yield from read(stream, column, path)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix.lower() != ".zst":
        with path.open("rb") as stream:
            yield stream
        return
    try:
        import zstandard
    except ImportError as error:
        raise RuntimeError(
            f"Reading `{path.name}` needs the Python package 'zstandard', which is not installed "
            "here. Run `pip install zstandard`, or install this project with its extra `demo`."
        ) from error
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        yield stream


def _read_txt(stream: IO[bytes], column: DocumentColumn, _path: Path) -> Iterator[Content]:
    if column.content != "text":
        raise ValueError(f"a .txt file holds text, and `data.content` is {column.content!r}")
    with io.TextIOWrapper(stream, encoding="utf-8") as lines:
        text = lines.read()
    yield from (part.strip("\n") for part in _BLANK_LINE.split(text))


def _read_jsonl(stream: IO[bytes], column: DocumentColumn, path: Path) -> Iterator[Content]:
    name = column.name
    with io.TextIOWrapper(stream, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _json_object(line, number)
            if name not in row:
                name = column.among(list(row), f"{path}, line {number}")
            content = column.read(row[name], f"line {number}, {name!r}")
            # JSON can spell half a character, which no tokenizer takes.
            is_text = isinstance(content, str)
            yield content.encode("utf-8", "replace").decode() if is_text else content


def _json_object(line: str, number: int) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"line {number} holds {type(row).__name__}, not an object")
    return row


def _read_csv(stream: IO[bytes], column: DocumentColumn, path: Path) -> Iterator[Content]:
    with _csv_rows(stream) as rows:
        name = column.among(rows.fieldnames or [], path)
        texts = [column.read(row[name], f"row {i}, {name!r}") for i, row in enumerate(rows)]
    yield from texts


@contextmanager
def _csv_rows(stream: IO[bytes]) -> Iterator[csv.DictReader[str]]:
    # The csv module's limit on a field is the process's, and smaller than an article.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as lines:
            yield csv.DictReader(lines)
    finally:
        csv.field_size_limit(limit)


def _read_parquet(stream: IO[bytes], column: DocumentColumn, path: Path) -> Iterator[Content]:
    from pyarrow import parquet

    seekable = stream if stream.seekable() and path.suffix != ".zst" else io.BytesIO(stream.read())
    with parquet.ParquetFile(seekable) as file:
        name = column.among(file.schema_arrow.names, path)
        batches = file.iter_batches(columns=[name])
        for number, value in enumerate(value for batch in batches for value in batch[name]):
            yield column.read(value.as_py(), f"row {number}, {name!r}")


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Name the file in whatever a reader raises."""
    try:
        yield
    except RuntimeError:
        raise
    except Exception as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"`data.source` must be files that can be read; `{path}` can't: "
            f"{type(error).__name__}: {error}. Check the file, or leave it out."
        ) from error


_Reader = Callable[[IO[bytes], DocumentColumn, Path], Iterator[Content]]
_READERS: dict[str, _Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
TEXT_SUFFIXES = tuple(suffix + end for suffix in _READERS for end in ("", ".zst"))
