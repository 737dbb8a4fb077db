"""The section `data`: the text, and which of its tokens count."""

from __future__ import annotations

from dataclasses import dataclass

from .names import BosName, ContentName, ContextsName, MaskName
from .rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, how it becomes contexts of tokens, and which tokens count."""

    source: str = ""
    """A hub dataset id, a file or glob (.txt with documents between blank lines, .jsonl, .csv,
    .parquet, each also .zst), a folder saved by `datasets`, or `package:NAME`."""

    subset: str | None = None
    """The hub dataset's configuration name; for `package:` sources, comma-separated globs over its
    file names. Refused for local files."""

    split: str = "train"
    """The split of a hub dataset or of a saved folder."""

    content: ContentName = "text"
    """What a document is: text; chat, messages with role and content (or ShareGPT's from and
    value), written out by the tokenizer's chat template; tokens, token ids."""

    column: str | None = None
    """The column with the documents; None takes the first that exists of text, content, prompt
    (text), messages, conversations, conversation (chat), input_ids, tokens (tokens)."""

    context_size: int = 256
    """Tokens in one context, BOS included."""

    contexts: ContextsName = "packed"
    """packed lets documents follow each other in a context, so that none is wasted; document begins
    a context with each document and pads its last one, on the right."""

    bos: BosName = "document"
    """Where the tokenizer's BOS token is put, where it has one: before every document and at each
    context's start, at each context's start alone, or nowhere; never before another BOS."""

    mask: tuple[MaskName, ...] = ("bos", "first", "special")
    """Tokens left out of training and evaluation: BOS, each context's first position, other special
    tokens. Padding is always left out."""

    exclude_tokens: tuple[int | str, ...] = ()
    """More tokens left out of training and evaluation, though the model reads them: a number is a
    token's id; text is one token, as the vocabulary spells it or as it reads."""

    max_norm_ratio: float | None = None
    """Leave out tokens whose activation norm exceeds this multiple of the median norm of the first
    activations; None keeps all."""

    held_out_fraction: float = 0.02
    """Share of documents that training never sees, chosen by a hash of them, in (0, 1)."""

    def __post_init__(self) -> None:
        require(
            self.context_size >= 2,
            "data.context_size",
            "must be at least 2 tokens",
            self.context_size,
            "Use 64 to 1024.",
        )
        require(
            0 < self.held_out_fraction < 1,
            "data.held_out_fraction",
            "must be in (0, 1)",
            self.held_out_fraction,
            "Use about 0.02.",
        )
        require_positive("data", self, "max_norm_ratio")
