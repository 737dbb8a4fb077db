"""Token ids of what documents hold.

Text goes through the tokenizer, which adds nothing to it. A conversation is first written out by
the tokenizer's chat template. Token ids are taken as they are, once they are known to be ids that
the model reads. Where a BOS token is put is `sae.stream.packing`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from sae.config import ContentName
from sae.stream.content import Content, messages_of
from sae.stream.documents import Document, Documents, LocalDocuments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL = 64
CHARACTERS_PER_CALL = 400_000


class DocumentTokenizer:
    """Turns documents into token ids.

    Args:
        vocabulary_size: the number of ids that the model reads.

    Raises ValueError where conversations come without a chat template to write them out, or where
    token ids that lie in memory are none of the model's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: Documents,
        content: ContentName,
        vocabulary_size: int,
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._source = documents.name
        self._vocabulary_size = vocabulary_size
        self._ids = {"text": self._of_texts, "chat": self._of_chats, "tokens": self._checked}[
            content
        ]
        if content == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "`data.content` chat needs a tokenizer with a chat template; the model's has none. "
                "Choose a model that is made for chat, or give text."
            )
        if content == "tokens" and _is_in_memory(documents):
            for index, ids in enumerate(documents.contents):
                self._require_known(ids, index)

    def __call__(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Sequence[int]]]:
        """Yield each document with its token ids."""
        for group in _groups(documents):
            yield from zip(group, self._ids(group), strict=True)

    def _of_texts(self, group: Sequence[Document]) -> Sequence[Sequence[int]]:
        return self._tokenize([str(document.content) for document in group])

    def _of_chats(self, group: Sequence[Document]) -> Sequence[Sequence[int]]:
        return self._tokenize([self._written_out(document) for document in group])

    def _checked(self, group: Sequence[Document]) -> Sequence[Sequence[int]]:
        return [self._require_known(document.content, document.index) for document in group]

    def _tokenize(self, texts: list[str]) -> Sequence[Sequence[int]]:
        return self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _written_out(self, document: Document) -> str:
        from jinja2 import TemplateError

        messages = messages_of(document.content)
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                "`data.source` must hold conversations that the tokenizer's chat template takes; "
                f"it refuses number {document.index} of {self._source!r}, with the roles {roles}: "
                f"{error} Leave such conversations out, or choose another model."
            ) from error

    def _require_known(self, ids: Content, index: int) -> Any:
        array = np.asarray(ids)
        is_unknown = (array < 0) | (array >= self._vocabulary_size)
        if is_unknown.any():
            raise ValueError(
                f"`data.source` must hold token ids that the model reads, in "
                f"[0, {self._vocabulary_size}); document {index} of {self._source!r}, counted from "
                f"0, holds {int(array[is_unknown][0])}. Tokenise it with the model's own tokenizer."
            )
        return ids


def _is_in_memory(documents: Documents) -> TypeGuard[LocalDocuments]:
    return isinstance(documents, LocalDocuments) and isinstance(documents.contents, list)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents so that one tokenizer call neither is tiny nor holds much text."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.content)
        if len(group) == DOCUMENTS_PER_CALL or size >= CHARACTERS_PER_CALL:
            yield group
            group, size = [], 0
    if group:
        yield group
