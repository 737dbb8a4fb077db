"""Rows of one size out of documents' tokens: packed without waste, or each document in its own.

packed     Documents follow each other; one that does not fit goes on in the next row. Only the last
           row of all is padded.
document   A document begins a row and goes on in the rows after it; its last row is padded. The
           padding stands on the right, where causal attention keeps it from every real token, so
           that the model needs no attention mask.

A BOS token is put where `bos` says, but never before another: a chat template or a tokenised data
set may have brought its own. In rows of one document `document` and `context` are the same.

A position lies between two tokens, and rows are a function of the tokens behind it: going on from
the position behind any row gives the rows that follow it. Behind a document's last token, padded or
not, it is (its place, its length), so that nothing is left of the document when reading goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sae.config import BosName, ContextsName
from sae.stream.masks import PADDING_DOCUMENT


@dataclass(frozen=True)
class Position:
    """The next token: `offset` tokens into the document at `place` of the epoch's order."""

    epoch: int = 0
    place: int = 0
    offset: int = 0


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's tokens, its number in the source, and the position at which to read on."""

    ids: Sequence[int]
    index: int
    position: Position


class Row:
    """A context being filled: its tokens and the document that each comes from."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tokens: list[int] = []
        self.document_ids: list[int] = []

    @property
    def room(self) -> int:
        return self.size - len(self.tokens)

    def add(self, ids: Sequence[int], document_id: int) -> int:
        """Append what fits; return how many that are."""
        piece = ids[: self.room]
        self.tokens += piece
        self.document_ids += [document_id] * len(piece)
        return len(piece)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become rows of `context_size` tokens; `bos_id` None puts no BOS anywhere."""

    context_size: int
    contexts: ContextsName = "packed"
    bos: BosName = "document"
    bos_id: int | None = None
    pad_id: int = 0

    def rows(self, documents: Iterator[TokenizedDocument]) -> Iterator[tuple[Row, Position]]:
        """Yield full rows, each with the position behind it; pad the last where the text ends."""
        row, position = Row(self.context_size), Position()
        for document in documents:
            position = document.position
            while position.offset < len(document.ids):
                position = self._fill(row, document, position)
                if not row.room:
                    yield row, position
                    row = Row(self.context_size)
            if self.contexts == "document" and row.tokens:
                yield self._padded(row), position
                row = Row(self.context_size)
        if row.tokens:
            yield self._padded(row), position

    def _fill(self, row: Row, document: TokenizedDocument, position: Position) -> Position:
        """Append what fits of a document from `position` on; return the next position."""
        row.add(self._bos_before(row, document, position.offset), document.index)
        rest = document.ids[position.offset : position.offset + row.room]
        return replace(position, offset=position.offset + row.add(rest, document.index))

    def _bos_before(self, row: Row, document: TokenizedDocument, offset: int) -> list[int]:
        """Return the BOS token that belongs before a document's token, if one does."""
        is_due = not row.tokens or (self.bos == "document" and offset == 0)
        if not is_due or self.bos == "none" or self.bos_id is None:
            return []
        return [] if document.ids[offset] == self.bos_id else [self.bos_id]

    def _padded(self, row: Row) -> Row:
        row.add([self.pad_id] * row.room, PADDING_DOCUMENT)
        return row
