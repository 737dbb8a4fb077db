"""The source of text as documents, in an order fixed by (seed, epoch).

Local text is visited in a permutation of its documents; a hub dataset is streamed in its own order,
with its files permuted. A rank's share is every `world_size`-th place of that order. Which side of
the train/held-out split a document falls on depends on nothing but what it holds:

    held out  ⇔  blake2b(content) / 2⁶⁴ < fraction

What a document may hold is `sae.stream.content`; reading the formats of files is
`sae.stream.text_files`; tokens are `sae.stream.tokens`.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from sae.config import ContentName, DataConfig
from sae.stream.content import Content, DocumentColumn, content_bytes, has_content
from sae.stream.packages import is_package_source, package_files
from sae.stream.text_files import TEXT_SUFFIXES, has_text_suffix, read_text_files

Part = Literal["train", "held_out"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Document:
    """One document: its number in the source, its place in the epoch's order, what it holds."""

    index: int
    place: int
    content: Content


class Documents(Protocol):
    """A source of documents; empty ones are never given."""

    name: str

    def visit(
        self, *, seed: int, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield the rank's documents of one epoch whose place is at least `start`, in order."""
        ...


class LocalDocuments:
    """Documents that can be indexed: a list, or a column of a `datasets` table on disk."""

    def __init__(self, contents: Sequence[Content], name: str) -> None:
        self.contents = contents
        self.name = name

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> Content:
        return self.contents[index]

    def visit(
        self, *, seed: int, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        order = torch.randperm(len(self), generator=_generator(seed, epoch))
        first = start + (rank - start) % world_size
        for place in range(first, len(self), world_size):
            index = int(order[place])
            content = self[index]
            if has_content(content):
                yield Document(index, place, content)


class StreamedDocuments:
    """Rows of a `datasets` iterable, as they arrive from the hub.

    Starting in the middle of an epoch reads and drops the rows before it.
    """

    def __init__(self, rows: Any, column: str, name: str, content: ContentName = "text") -> None:
        self.rows = rows
        self.column = DocumentColumn(content, column)
        self.name = name

    def visit(
        self, *, seed: int, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        # A buffer of one permutes the dataset's files and leaves their rows in order.
        rows = self.rows.shuffle(seed=_seed(seed, epoch) % 2**31, buffer_size=1)
        first = start + (rank - start) % world_size
        places = islice(enumerate(rows), first, None, world_size)
        for place, row in places:
            where = f"row {place} of {self.name!r}, {self.column.name!r},"
            content = self.column.read(row[self.column.name], where)
            if has_content(content):
                yield Document(place, place, content)


def open_documents(cfg: DataConfig) -> Documents:
    """Open the text that `cfg.source` names.

    Raises ValueError where it is not there, unreadable, empty or lacks the column, and RuntimeError
    where a package is missing or the hub can't be reached.
    """
    if not cfg.source.strip():
        raise ValueError(
            "`data.source` must name a text; got an empty name. "
            "Give a hub dataset, a file or glob, or `package:NAME`."
        )
    if is_package_source(cfg.source):
        return _from_files(package_files(cfg.source, cfg.subset, TEXT_SUFFIXES), cfg)
    path = Path(cfg.source).expanduser()
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if files and cfg.subset is not None:
        raise ValueError(
            "`data.subset` must be left out for local text; got "
            f"{cfg.subset!r} with {cfg.source!r}. Name the files in `data.source`, by a glob."
        )
    if path.is_dir():
        return _from_saved_dataset(path, cfg)
    if files:
        return _from_files(files, cfg)
    if has_text_suffix(path) or glob.has_magic(cfg.source) or not _HUB_ID.fullmatch(cfg.source):
        raise ValueError(
            f"`data.source` must be a hub dataset, files that exist, or `package:NAME`; got "
            f"{cfg.source!r}, which matches no file. Check the path and the working directory."
        )
    return _from_hub(cfg)


def is_held_out(content: Content, fraction: float) -> bool:
    """Whether a document belongs to the held-out part; equal ones always fall on one side."""
    digest = hashlib.blake2b(content_bytes(content), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def visit_part(
    documents: Documents, part: Part, fraction: float, **places: int
) -> Iterator[Document]:
    """Yield what `documents.visit(**places)` does, of one side of the split."""
    for document in documents.visit(**places):
        if is_held_out(document.content, fraction) == (part == "held_out"):
            yield document


def _from_files(files: Sequence[Path], cfg: DataConfig) -> LocalDocuments:
    contents = read_text_files(files, DocumentColumn.of(cfg))
    return LocalDocuments(_require_some(contents, cfg.source), cfg.source)


def _from_saved_dataset(path: Path, cfg: DataConfig) -> LocalDocuments:
    """Open a folder that `save_to_disk` wrote; its table stays on disk."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(
            f"`data.source` must be a folder that `datasets` saved, or files; got the folder "
            f"{cfg.source!r} without a saved dataset. For files in it give a glob such as "
            f"{str(path / '*.jsonl')!r}."
        )
    import datasets

    table = datasets.load_from_disk(str(path))
    if isinstance(table, datasets.DatasetDict):
        table = _choose_split(table, cfg)
    contents = _TableColumn(table, DocumentColumn.of(cfg), cfg.source)
    return LocalDocuments(_require_some(contents, cfg.source), cfg.source)


def _choose_split(table: Any, cfg: DataConfig) -> Any:
    if cfg.split not in table:
        raise ValueError(
            f"`data.split` must be a split of {cfg.source!r}; got {cfg.split!r}, and it has: "
            f"{', '.join(map(str, table))}. Give one of them."
        )
    return table[cfg.split]


class _TableColumn(Sequence[Content]):
    """One column of a table on disk, read one row at a time."""

    def __init__(self, table: Any, column: DocumentColumn, source: str) -> None:
        self._name = column.among(table.column_names, source)
        # A table may have been saved with the wish to give tensors.
        self._rows = table.select_columns([self._name]).with_format(None)
        self._column = column
        self._source = source

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        where = f"row {index} of {self._source!r}, {self._name!r},"
        return self._column.read(self._rows[index][self._name], where)


def _from_hub(cfg: DataConfig) -> StreamedDocuments:
    import datasets

    try:
        rows = datasets.load_dataset(cfg.source, cfg.subset, split=cfg.split, streaming=True)
        first = next(iter(rows), None)
    except (OSError, ValueError) as error:
        raise _hub_error(cfg, error) from error
    if first is None:
        raise ValueError(_empty(cfg.source))
    column = DocumentColumn.of(cfg).among(list(first), cfg.source)
    return StreamedDocuments(rows, column, cfg.source, cfg.content)


def _hub_error(cfg: DataConfig, error: Exception) -> Exception:
    cause = f"{type(error).__name__}: {str(error).strip()}"
    if isinstance(error, ConnectionError):
        return RuntimeError(
            f"`data.source` {cfg.source!r} is no file here, and the hub could not be reached "
            f"({cause}). Check the connection, or give a local file or `package:NAME`."
        )
    return ValueError(
        "`data.source`, `data.subset` and `data.split` must name a dataset on the hub; got "
        f"{cfg.source!r}, {cfg.subset!r}, {cfg.split!r}. {cause}"
    )


def _require_some(contents: Sequence[Content], source: str) -> Sequence[Content]:
    if not any(map(has_content, contents)):
        raise ValueError(_empty(source))
    return contents


def _empty(source: str) -> str:
    return (
        f"`data.source` must hold at least one document; {source!r} holds none. "
        "Give another source, or check `data.column`."
    )


def _seed(seed: int, epoch: int) -> int:
    digest = hashlib.blake2b(f"document order/{seed}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, epoch))
