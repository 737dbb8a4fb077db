"""A tokenizer and a hub dataset small enough to reason about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sae.config import DataConfig
from sae.stream.contexts import Contexts
from sae.stream.tokens import ContextStream


class Characters:
    """A tokenizer whose tokens are characters; its chat template writes each message's role."""

    eos_token_id = None
    pad_token_id = 1
    chat_template = "in Python, below"

    def __init__(self, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id
        self.all_special_ids = [] if bos_token_id is None else [bos_token_id]

    def __len__(self) -> int:
        return 0x110000

    def __call__(self, texts: list[str], **_options: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(character) for character in text] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}

    def apply_chat_template(self, messages: list[dict[str, Any]], *, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"{message['role']}:{message['content']}" for message in messages)


class HubRows:
    """Stands in for a streaming `datasets` iterable of two files."""

    def __init__(self, files: list[list[Any]], column: str = "content") -> None:
        self.files = files
        self.column = column

    def shuffle(self, *, seed: int, buffer_size: int) -> HubRows:
        assert buffer_size == 1
        return HubRows(self.files[:: -1 if seed % 2 else 1], self.column)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({self.column: value} for file in self.files for value in file)


def make_stream(documents: Any, tokenizer: Any, **options: Any) -> ContextStream:
    """Make a stream of contexts of 16 tokens; options are its own or settings of `data`."""
    names = ("part", "seed", "rank", "world_size", "vocabulary_size")
    place = {name: options.pop(name) for name in names if name in options}
    cfg = DataConfig(**{"context_size": 16, "held_out_fraction": 0.2, **options})
    return ContextStream(documents, tokenizer, cfg, **{"part": "train", **place})


def assert_same(a: Contexts, b: Contexts) -> None:
    for name in ("tokens", "document_ids", "is_kept"):
        assert torch.equal(getattr(a, name), getattr(b, name))
