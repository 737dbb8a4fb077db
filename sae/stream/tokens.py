"""Documents as contexts of tokens, in a stream that is resumable at every batch.

Documents follow each other in the epoch's order (`sae.stream.documents`), become token ids
(`sae.stream.tokenizing`), and fill contexts as `data.contexts` and `data.bos` say
(`sae.stream.packing`); `data.mask` and `data.exclude_tokens` say which tokens of them count
(`sae.stream.masks`).

The stream's position is (epoch, place of the document in the epoch's order, tokens of it already
used): all else follows from it and the seed, so continuing from a saved position gives the same
batches bit for bit. In the endless stream the last packed context of an epoch is filled up from the
next epoch; a single pass pads it instead, so that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch

from sae.config import DataConfig
from sae.stream.contexts import Contexts
from sae.stream.documents import Document, Documents, LocalDocuments, Part, is_held_out, visit_part
from sae.stream.masks import TokenMask, find_token_ids
from sae.stream.packing import Packing, Position, Row, TokenizedDocument
from sae.stream.tokenizing import DocumentTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ContextStream:
    """Contexts of one part of a text, for one of `world_size` ranks.

    Args:
        part: "train" or "held_out"; a document is in one of them, by a hash of what it holds.
        seed: fixes the order of documents in every epoch.
        vocabulary_size: the number of token ids that the model reads; None: the tokenizer's.

    Raises ValueError where local text leaves this part or rank without documents, and where the
    tokenizer can't do what `cfg` asks for.
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
        vocabulary_size: int | None = None,
    ) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.cfg = cfg
        vocabulary_size = vocabulary_size or len(tokenizer)
        self.part: Part = part
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._tokenize = DocumentTokenizer(tokenizer, documents, cfg.content, vocabulary_size)
        self._packing = _packing(tokenizer, cfg, vocabulary_size)
        excluded_ids = find_token_ids(tokenizer, cfg.exclude_tokens, vocabulary_size)
        self._mask = TokenMask.of(tokenizer, cfg.mask, excluded_ids)
        self._go_to(Position())
        if isinstance(documents, LocalDocuments) and next(self._visit(Position()), None) is None:
            raise ValueError(self._nothing())

    @property
    def epoch(self) -> int:
        """The number of whole passes over the documents before the last token given."""
        return self._position.epoch

    def next_batch(self, b: int) -> Contexts:
        """Return the next b contexts of the endless stream.

        Raises ValueError once a whole epoch has kept no token: more epochs would give none either.
        """
        rows = list(islice(self._rows, b))
        self._position = rows[-1][1]
        contexts = self._contexts([row for row, _ in rows])
        self._require_kept(contexts)
        return contexts

    def batches(self, b: int) -> Iterator[Contexts]:
        """Yield epoch 0 from its beginning in batches of b contexts; the last may hold fewer.

        The last context is padded. The endless stream's position is neither used nor changed.
        """
        start = Position()
        rows = (row for row, _ in self._packing.rows(self._read(start)))
        is_empty = True
        while chunk := list(islice(rows, b)):
            is_empty = False
            yield self._contexts(chunk)
        if is_empty:
            raise ValueError(self._nothing())

    def masked_shares(self, contexts: Contexts) -> dict[str, float]:
        """Return the share of tokens that are left out, by reason, each in [0, 1]."""
        return self._mask.shares(contexts)

    def sample_shares(self, n_contexts: int) -> dict[str, float]:
        """Return what share of the first n_contexts' tokens is "kept", and left out by reason.

        The shares add up to 1. The endless stream's position is neither used nor changed.
        """
        contexts = next(self.batches(n_contexts))
        is_kept = contexts.is_kept.double().mean().item()
        return {"kept": is_kept, **self.masked_shares(contexts)}

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch, as a small dict of numbers and strings."""
        return asdict(self._position) | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises ValueError where it belongs to another text, part, seed, number of ranks, or to
        contexts made in another way, with which the same batches can't come.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"A stream continues only with the same {name}; the saved position has "
                    f"{state.get(name)!r}, this run {value!r}. Restore it, or start a new run."
                )
        self._go_to(Position(state["epoch"], state["place"], state["offset"]))

    def _go_to(self, position: Position) -> None:
        self._position = position
        self._rows = self._packing.rows(self._endless(position))
        # The last epoch known to keep a token. One that is read in part speaks for none.
        is_edge = (position.place, position.offset) == (0, 0)
        self._kept_epoch = position.epoch - 1 if is_edge else position.epoch

    def _identity(self) -> dict[str, Any]:
        documents = self.documents
        return {
            "part": self.part,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "content": self.cfg.content,
            "context_size": self.cfg.context_size,
            "contexts": self.cfg.contexts,
            "bos": self.cfg.bos,
            "held_out_fraction": self.cfg.held_out_fraction,
            "n_documents": len(documents) if isinstance(documents, LocalDocuments) else None,
        }

    def _visit(self, position: Position) -> Iterator[Document]:
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

    def _endless(self, start: Position) -> Iterator[TokenizedDocument]:
        """Yield the tokenized documents of all epochs from `start` on."""
        position = start
        for epoch in count(start.epoch):
            is_empty = True
            for document in self._read(position):
                is_empty = False
                yield document
            if is_empty and position.place == 0:
                raise ValueError(self._nothing())
            position = Position(epoch + 1)

    def _read(self, start: Position) -> Iterator[TokenizedDocument]:
        """Yield the tokenized documents of one epoch from `start` on."""
        for document, ids in self._tokenize(self._visit(start)):
            offset = start.offset if document.place == start.place else 0
            if len(ids) > 0:
                position = Position(start.epoch, document.place, offset)
                yield TokenizedDocument(ids, document.index, position)

    def _contexts(self, rows: list[Row]) -> Contexts:
        tokens = torch.tensor([row.tokens for row in rows])
        document_ids = torch.tensor([row.document_ids for row in rows])
        return Contexts(tokens, document_ids, self._mask.is_kept(tokens, document_ids))

    def _require_kept(self, contexts: Contexts) -> None:
        epoch = self._position.epoch
        if contexts.is_kept.any():
            self._kept_epoch = epoch
        elif epoch > self._kept_epoch + 1:
            shares = ", ".join(f"{k} {v:.3g}" for k, v in self.masked_shares(contexts).items())
            raise ValueError(
                "`data.mask` and `data.exclude_tokens` must leave tokens to train on; a whole "
                f"epoch of `data.source` {self.documents.name!r} kept none (shares of the last "
                f"tokens left out: {shares}). Mask or exclude fewer, or give other text."
            )

    def _nothing(self) -> str:
        fraction = self.cfg.held_out_fraction
        which = "held out" if self.part == "held_out" else "for training"
        counts = ""
        if isinstance(self.documents, LocalDocuments):
            contents = self.documents.contents
            n = sum(is_held_out(c, fraction) == (self.part == "held_out") for c in contents)
            counts = f" of its {len(contents)} documents {n} are {which}, and"
        change = "Raise" if self.part == "held_out" else "Lower"
        return (
            f"`data.source` {self.documents.name!r} must leave documents {which} to every rank; "
            f"with `data.held_out_fraction` {fraction}{counts} rank {self.rank} of "
            f"{self.world_size} gets none that holds tokens. {change} `data.held_out_fraction`, "
            "give more text, or run fewer processes."
        )


def _packing(tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, vocabulary_size: int) -> Packing:
    bos_id: Any = tokenizer.bos_token_id
    # A tokenizer may have been given a padding token that the model has no embedding for.
    pads: tuple[Any, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return Packing(
        context_size=cfg.context_size,
        contexts=cfg.contexts,
        bos=cfg.bos,
        bos_id=bos_id,
        pad_id=next(i for i in pads if i is not None and i < vocabulary_size),
    )
