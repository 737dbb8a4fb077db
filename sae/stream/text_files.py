"""Text out of files: .txt, .jsonl, .csv and .parquet, each also compressed as .zst.

One document is: in .txt, what stands between blank lines; in .jsonl, one line's object; in .csv and
.parquet, one row. Where a file has columns, `text_column` says which, and None takes the first of
text, content, prompt. Files are read whole into memory; for text larger than memory use a hub
dataset or a folder written by `datasets` (`sae.stream.documents`).
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

TEXT_COLUMNS = ("text", "content", "prompt")
_BLANK_LINE = re.compile(r"\n\s*\n")


def read_text_files(paths: Sequence[Path], text_column: str | None) -> list[str]:
    """Return the documents of all files, in the order of `paths`, empty ones left out.

    Raises ValueError, naming the file, where one can't be read or has no such column.
    """
    texts: list[str] = []
    for path in paths:
        with _clear_errors(path):
            texts += (text for text in _read_file(path, text_column) if text and text.strip())
    return texts


def choose_column(columns: Sequence[str], text_column: str | None, where: object) -> str:
    """Return the column that holds the text, or raise ValueError listing those that exist."""
    wanted = TEXT_COLUMNS if text_column is None else (text_column,)
    for name in wanted:
        if name in columns:
            return name
    raise ValueError(
        f"`data.text_column` must be a column of `{where}`; got {text_column!r}, and the columns "
        f"are: {', '.join(map(str, columns))}. Give the one that holds the text."
    )


def has_text_suffix(path: Path) -> bool:
    """Whether the file's name says that it can be read here."""
    return path.name.lower().endswith(TEXT_SUFFIXES)


def _read_file(path: Path, text_column: str | None) -> Iterator[str]:
    name = path.name.lower().removesuffix(".zst")
    read = _READERS.get(Path(name).suffix)
    if read is None:
        raise ValueError(
            f"A text file must end in {', '.join(_READERS)} or those with .zst; got `{path}`. "
            "Convert or rename it."
        )
    with _open(path) as stream:
        yield from read(stream, text_column, path)


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


def _read_txt(stream: IO[bytes], _text_column: str | None, _path: Path) -> Iterator[str]:
    with io.TextIOWrapper(stream, encoding="utf-8") as lines:
        text = lines.read()
    yield from (part.strip("\n") for part in _BLANK_LINE.split(text))


def _read_jsonl(stream: IO[bytes], text_column: str | None, path: Path) -> Iterator[str]:
    column = text_column
    with io.TextIOWrapper(stream, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _json_object(line, number)
            if column not in row:
                column = choose_column(list(row), text_column, f"{path}, line {number}")
            text = _require_text(row[column], f"line {number}, {column!r}")
            # JSON can spell half a character, which no tokenizer takes.
            yield text.encode("utf-8", "replace").decode()


def _json_object(line: str, number: int) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"line {number} holds {type(row).__name__}, not an object")
    return row


def _read_csv(stream: IO[bytes], text_column: str | None, path: Path) -> Iterator[str]:
    # The csv module's limit on a field is the process's, and smaller than an article.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            column = choose_column(rows.fieldnames or [], text_column, path)
            texts = [row[column] or "" for row in rows]
    finally:
        csv.field_size_limit(limit)
    yield from texts


def _read_parquet(stream: IO[bytes], text_column: str | None, path: Path) -> Iterator[str]:
    from pyarrow import parquet

    seekable = stream if stream.seekable() and path.suffix != ".zst" else io.BytesIO(stream.read())
    with parquet.ParquetFile(seekable) as file:
        column = choose_column(file.schema_arrow.names, text_column, path)
        for batch in file.iter_batches(columns=[column]):
            yield from (_require_text(text, repr(column)) for text in batch[0].to_pylist())


def _require_text(value: object, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} holds {type(value).__name__}, not text")
    return value or ""


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


_Reader = Callable[[IO[bytes], str | None, Path], Iterator[str]]
_READERS: dict[str, _Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
TEXT_SUFFIXES = tuple(suffix + end for suffix in _READERS for end in ("", ".zst"))
