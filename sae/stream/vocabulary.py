"""What a token id looks like: its text, or its raw bytes where it is only a part of a character.

The one idea: a token's text is what it adds when decoded after another token, which keeps the
leading space that decoding it alone may drop. Bytes of part-characters are kept as `⟨E2 80⟩`, so
that a reader (and the report, which joins neighbours into the character) can see them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
BYTES_FORM = re.compile(r"⟨((?:[0-9A-F]{2})(?: [0-9A-F]{2})*)⟩")
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each of `ids` adds; part-characters as ⟨hex bytes⟩."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = _decode(tokenizer, anchor)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        _text(_decode(tokenizer, [*anchor, i]), before, piece)
        for i, piece in zip(ids, pieces, strict=True)
    ]


def join_texts(texts: Sequence[str]) -> str:
    """Return the text of consecutive tokens, joining the bytes of split characters."""
    joined = b"".join(to_bytes(text) for text in texts)
    return joined.decode("utf-8", errors="replace")


def visible(text: str) -> str:
    """Return `text` on one line: newlines and tabs become visible marks."""
    return text.replace("\n", "↵").replace("\r", "␍").replace("\t", "⇥")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _text(decoded: str, before: str, piece: str | None) -> str:
    text = decoded.removeprefix(before)
    if UNDECODABLE not in text or piece is None:
        return text
    raw = piece_bytes(piece)
    return text if raw is None else "⟨" + raw.hex(" ").upper() + "⟩"


def piece_bytes(piece: str) -> bytes | None:
    """Return the bytes that a vocabulary entry stands for: `<0xE2>`, or GPT-2's byte alphabet."""
    if match := _FALLBACK_BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return None


def to_bytes(text: str) -> bytes:
    """Return the bytes of a token's text, of a part-character those that it stands for."""
    match = BYTES_FORM.fullmatch(text)
    return bytes.fromhex(match[1]) if match else text.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: a printable character for each byte, shifted by 256 where none is.

    Source: Radford et al. 2019, the released encoder's `bytes_to_unicode`.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted
