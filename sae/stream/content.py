"""What a document holds, `data.content`, and the column that holds it.

    content  in the column                                                   carried as
    text     text                                                            that text
    chat     messages: {"role", "content"} or ShareGPT's {"from", "value"}   canonical JSON of them
    tokens   token ids                                                       an array of int32

What is carried depends on the row alone, so its bytes say on which side of the train/held-out split
it falls. Token ids are made from it in `sae.stream.tokenizing`.
"""

from __future__ import annotations

import json
import reprlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.config import ContentName, DataConfig

Content = str | Sequence[int]
"""A document: text, a conversation as canonical JSON, or token ids."""

COLUMNS: dict[ContentName, tuple[str, ...]] = {
    "text": ("text", "content", "prompt"),
    "chat": ("messages", "conversations", "conversation"),
    "tokens": ("input_ids", "tokens"),
}
_MEANINGS: dict[ContentName, str] = {
    "text": "text",
    "chat": "a list of messages with a role and text",
    "tokens": "a list of token ids",
}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class DocumentColumn:
    """Which column holds the documents, and what they are.

    `name` None takes the first column of `COLUMNS[content]` that exists.
    """

    content: ContentName = "text"
    name: str | None = None

    @classmethod
    def of(cls, cfg: DataConfig) -> DocumentColumn:
        return cls(cfg.content, cfg.column)

    def among(self, columns: Sequence[str], where: object) -> str:
        """Return the column's name, or raise ValueError listing those that exist."""
        wanted = COLUMNS[self.content] if self.name is None else (self.name,)
        for name in wanted:
            if name in columns:
                return name
        raise ValueError(
            f"`data.column` must be a column of `{where}`; got {self.name!r}, and the columns are: "
            f"{', '.join(map(str, columns))}. Give the one that holds the documents, or set "
            f"`data.content`, which is {self.content!r}."
        )

    def read(self, value: Any, where: str) -> Content:
        """Return what a column holds in one row; nothing is an empty document.

        Raises ValueError, naming `where`, for what is no such content.
        """
        if value is None:
            return ""
        content = _READERS[self.content](value)
        if content is None:
            raise ValueError(
                f"{where} holds {type(value).__name__}, not {_MEANINGS[self.content]} "
                f"(`data.content` is {self.content!r}): {reprlib.repr(value)}"
            )
        return content


def has_content(content: Content) -> bool:
    """Whether a document holds anything; white space is nothing."""
    return bool(content.strip()) if isinstance(content, str) else len(content) > 0


def content_bytes(content: Content) -> bytes:
    """Return the document as bytes that are the same on every machine."""
    if isinstance(content, str):
        return content.encode("utf-8", "surrogatepass")
    return np.asarray(content, dtype="<i4").tobytes()


def messages_of(content: Content) -> list[dict[str, Any]]:
    """Return the messages of a conversation that `DocumentColumn.read` gave."""
    return json.loads(str(content))


def _read_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _read_token_ids(value: Any) -> Content | None:
    if isinstance(value, list):
        # Four bytes an id in memory, where a list of Python ints takes up to 36.
        with suppress(TypeError, OverflowError):
            return array("i", value)
    return None


def _read_messages(value: Any) -> str | None:
    """Return messages as JSON without spaces, with sorted keys; without messages, nothing."""
    if not isinstance(value, list):
        return None
    messages = [_message(message) for message in value]
    if None in messages:
        return None
    if not messages:
        return ""
    return json.dumps(
        messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str
    )


def _message(value: Any) -> dict[str, Any] | None:
    """Return one message with `role` and `content`, besides what else it holds (tool calls)."""
    if not isinstance(value, dict):
        return None
    # A table fills the fields that a message lacks with None.
    message = {name: part for name, part in value.items() if part is not None}
    is_sharegpt = "from" in message and "role" not in message
    role_name, text_name = ("from", "value") if is_sharegpt else ("role", "content")
    role = message.pop(role_name, None)
    text = message.pop(text_name, "" if text_name in value else None)
    if not isinstance(role, str) or not isinstance(text, str):
        return None
    role = _SHAREGPT_ROLES.get(role, role) if is_sharegpt else role
    return {**message, "role": role, "content": text}


_READERS = {"text": _read_text, "chat": _read_messages, "tokens": _read_token_ids}
