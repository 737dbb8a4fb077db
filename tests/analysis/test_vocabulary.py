"""Token texts: leading spaces are kept, part-characters are bytes that join again."""

from __future__ import annotations

import pytest

from sae.analysis import OpenedRun
from sae.stream.vocabulary import join_texts, piece_bytes, token_texts, visible

TEXTS = ["the of and", " two  spaces\n\tand a tab", "naïve 🙂🙃 日本 </script>", "e\u0301 & <b>"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_tokens_join_to_the_text(opened_run: OpenedRun, text: str):
    tokenizer = opened_run.lm.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert join_texts(texts) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)


def test_parts_of_a_character_are_shown_as_bytes(opened_run: OpenedRun):
    tokenizer = opened_run.lm.tokenizer
    texts = token_texts(tokenizer, tokenizer.encode("🙂", add_special_tokens=False))
    assert texts == ["⟨F0⟩", "⟨9F⟩", "⟨99⟩", "⟨82⟩"]


def test_special_tokens_keep_their_names(opened_run: OpenedRun):
    assert token_texts(opened_run.lm.tokenizer, [0]) == ["<bos>"]


def test_pieces_of_both_byte_conventions_are_read():
    assert piece_bytes("<0xE2>") == b"\xe2"
    assert piece_bytes("Ġð") == b" \xf0"
    assert piece_bytes("▁the") is None


def test_whitespace_becomes_visible():
    assert visible("a\n\tb") == "a↵⇥b"
