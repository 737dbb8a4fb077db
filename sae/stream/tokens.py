"""Documents as contexts of tokens, packed without waste and resumable at every batch.

Documents follow each other in the epoch's order. Where the tokenizer has a BOS token and
`data.prepend_bos` is set, one stands at the start of every context and before every document, so
that a context is BOS, text, BOS, text, …; a document that does not fit goes on in the next context.

The stream's position is (epoch, place of the document in the epoch's order, tokens of it already
used): all else follows from it and the seed, so continuing from a saved position gives the same
batches bit for bit. In the endless stream the last context of an epoch is filled up from the next
epoch; a single pass pads it instead, so that nothing is lost and packed contexts hold no padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch

from sae.config import DataConfig
from sae.stream.contexts import Contexts
from sae.stream.documents import Document, Documents, LocalDocuments, Part, is_held_out, visit_part
from sae.stream.masks import PADDING_DOCUMENT, TokenMask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL = 64
CHARACTERS_PER_CALL = 400_000


@dataclass(frozen=True)
class _Position:
    """The next token: `offset` tokens into the document at `place` of the epoch's order."""

    epoch: int = 0
    place: int = 0
    offset: int = 0


class _Row:
    """A context being filled."""

    def __init__(self, size: int, bos_id: int | None) -> None:
        self.size = size
        self.bos_id = bos_id
        self.tokens: list[int] = []
        self.document_ids: list[int] = []

    @property
    def room(self) -> int:
        return self.size - len(self.tokens)

    def add(self, ids: list[int], document_id: int, offset: int) -> int:
        """Append what fits of a document's tokens from `offset` on; return the next offset."""
        if self.bos_id is not None and (offset == 0 or not self.tokens):
            self._append([self.bos_id], document_id)
        piece = ids[offset : offset + self.room]
        self._append(piece, document_id)
        return offset + len(piece)

    def pad(self, pad_id: int) -> None:
        self._append([pad_id] * self.room, PADDING_DOCUMENT)

    def _append(self, ids: list[int], document_id: int) -> None:
        self.tokens += ids
        self.document_ids += [document_id] * len(ids)


class ContextStream:
    """Contexts of one part of a text, for one of `world_size` ranks.

    Args:
        part: "train" or "held_out"; a document is in one of them, by a hash of its text.
        seed: fixes the order of documents in every epoch.

    Raises ValueError where local text leaves this part or rank without documents.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        cfg: DataConfig,
        *,
        part: Part,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.part: Part = part
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._bos_id: Any = tokenizer.bos_token_id if cfg.prepend_bos else None
        self._mask = TokenMask.of(tokenizer, cfg.mask)
        self._position = _Position()
        self._rows: Iterator[tuple[_Row, _Position]] | None = None
        if isinstance(documents, LocalDocuments) and next(self._visit(_Position()), None) is None:
            raise ValueError(self._nothing())

    @property
    def epoch(self) -> int:
        """The number of whole passes over the documents before the last token given."""
        return self._position.epoch

    def next_batch(self, b: int) -> Contexts:
        """Return the next b contexts of the endless stream."""
        if self._rows is None:
            self._rows = self._pack(self._endless(self._position))
        rows = list(islice(self._rows, b))
        self._position = rows[-1][1]
        return self._contexts([row for row, _ in rows])

    def batches(self, b: int) -> Iterator[Contexts]:
        """Yield epoch 0 from its beginning in batches of b contexts; the last may hold fewer.

        The last context is padded. The endless stream's position is neither used nor changed.
        """
        start = _Position()
        rows = (row for row, _ in self._pack(self._tokenized(self._visit(start), start)))
        is_empty = True
        while chunk := list(islice(rows, b)):
            is_empty = False
            yield self._contexts(chunk)
        if is_empty:
            raise ValueError(self._nothing())

    def masked_shares(self, contexts: Contexts) -> dict[str, float]:
        """Return the share of tokens that `data.mask` leaves out, by reason, each in [0, 1]."""
        return self._mask.shares(contexts)

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch, as a small dict of numbers and strings."""
        return asdict(self._position) | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises ValueError where it belongs to another text, part, seed, context size or number of
        ranks, with which the same batches can't come.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"A stream continues only with the same {name}; the saved position has "
                    f"{state[name]!r}, this run {value!r}. Restore it, or start a new run."
                )
        self._position = _Position(state["epoch"], state["place"], state["offset"])
        self._rows = None

    def _identity(self) -> dict[str, Any]:
        documents = self.documents
        return {
            "part": self.part,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "context_size": self.cfg.context_size,
            "held_out_fraction": self.cfg.held_out_fraction,
            "n_documents": len(documents) if isinstance(documents, LocalDocuments) else None,
        }

    def _visit(self, position: _Position) -> Iterator[Document]:
        return visit_part(
            self.documents,
            self.part,
            self.cfg.held_out_fraction,
            seed=self.seed,
            epoch=position.epoch,
            start=position.place,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _endless(self, start: _Position) -> Iterator[tuple[list[int], int, _Position]]:
        """Yield the tokenized documents of all epochs from `start` on."""
        position = start
        for epoch in count(start.epoch):
            is_empty = True
            for item in self._tokenized(self._visit(position), position):
                is_empty = False
                yield item
            if is_empty and position.place == 0:
                raise ValueError(self._nothing())
            position = _Position(epoch + 1)

    def _tokenized(
        self, documents: Iterable[Document], start: _Position
    ) -> Iterator[tuple[list[int], int, _Position]]:
        """Yield each document's token ids, its index and the position at which to read on."""
        for group in _groups(documents):
            ids = self.tokenizer(
                [document.text for document in group],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            for document, document_ids in zip(group, ids, strict=True):
                offset = start.offset if document.place == start.place else 0
                position = _Position(start.epoch, document.place, offset)
                if document_ids:
                    yield document_ids, document.index, position

    def _pack(
        self, documents: Iterator[tuple[list[int], int, _Position]]
    ) -> Iterator[tuple[_Row, _Position]]:
        """Yield full rows, each with the position behind it; pad the last where the text ends."""
        row = self._new_row()
        position = _Position()
        for ids, index, position in documents:
            while position.offset < len(ids):
                position = replace(position, offset=row.add(ids, index, position.offset))
                if not row.room:
                    yield row, position
                    row = self._new_row()
        if row.tokens:
            row.pad(self._pad_id())
            yield row, position

    def _new_row(self) -> _Row:
        return _Row(self.cfg.context_size, self._bos_id)

    def _pad_id(self) -> int:
        candidates: tuple[Any, ...] = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(id_ for id_ in candidates if id_ is not None)

    def _contexts(self, rows: list[_Row]) -> Contexts:
        tokens = torch.tensor([row.tokens for row in rows])
        document_ids = torch.tensor([row.document_ids for row in rows])
        return Contexts(tokens, document_ids, self._mask.is_kept(tokens, document_ids))

    def _nothing(self) -> str:
        fraction = self.cfg.held_out_fraction
        which = "held out" if self.part == "held_out" else "for training"
        counts = ""
        if isinstance(self.documents, LocalDocuments):
            texts = self.documents.texts
            n = sum(is_held_out(text, fraction) == (self.part == "held_out") for text in texts)
            counts = f" of its {len(texts)} documents {n} are {which}, and"
        change = "Raise" if self.part == "held_out" else "Lower"
        return (
            f"`data.source` {self.documents.name!r} must leave documents {which} to every rank; "
            f"with `data.held_out_fraction` {fraction}{counts} rank {self.rank} of "
            f"{self.world_size} gets none that holds tokens. {change} `data.held_out_fraction`, "
            "give more text, or run fewer processes."
        )


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents so that one tokenizer call neither is tiny nor holds much text."""
    group: list[Document] = []
    n_characters = 0
    for document in documents:
        group.append(document)
        n_characters += len(document.text)
        if len(group) == DOCUMENTS_PER_CALL or n_characters >= CHARACTERS_PER_CALL:
            yield group
            group, n_characters = [], 0
    if group:
        yield group
