"""Concepts by rules: which tokens are on, however they are cut."""

from __future__ import annotations

import re

import pytest
import torch

from sae.evals.concepts import CONCEPTS, concepts_of, concepts_of_contexts

NAMES = list(CONCEPTS)


def on(concept: str, texts: list[str]) -> list[str]:
    """The tokens that are of the concept."""
    column = concepts_of(texts)[:, NAMES.index(concept)]
    return [text for text, is_on in zip(texts, column.tolist(), strict=True) if is_on]


def cut(text: str) -> list[str]:
    """Words with the space before them, as most tokenizers cut."""
    return re.findall(r"\s*(?:\w+|[^\w\s])", text)


@pytest.mark.parametrize(
    ("concept", "text", "expected"),
    [
        ("digit", "in 1987 he had 3 dogs", [" 1987", " 3"]),
        ("year", "in 1987 he had 300 dogs", [" 1987"]),
        ("money", "it cost $ 30 or 30 tons", [" $", " 30"]),
        ("all_capitals", "The BBC and the EU said", [" BBC", " EU"]),
        ("name_inside", "Dogs bite Mary. Dogs bark", [" Mary"]),
        ("sentence_start", 'Dogs bark. "Why?" Cats sleep', ["Dogs", " Cats"]),
        ("sentence_end", "Mr. Smith paid 3.50 now.", [".", "."]),
        ("question", "He came. Did he? Yes.", [" Did", " he", "?"]),
        ("quoted", 'He said "go home" and left', ["go", " home"]),
        ("bracketed", "dogs (all of them) bark", ["all", " of", " them"]),
        ("repeated_word", "Every house has every kind", [" every"]),
        ("negation", "he can't and will not", [" can", "'", "t", " not"]),
        ("female_pronoun", "Her dog and his", ["Her"]),
        ("past_tense", "he walked to a bed", [" walked"]),
        ("french", "il est dans la maison avec une amie. he is in the house", 8),
        ("german", "der Hund ist nicht im Haus und die Katze auch", 10),
        ("cyrillic", "это dog", ["это"]),
    ],
)
def test_a_rule_marks_its_tokens(concept: str, text: str, expected: list[str] | int) -> None:
    found = on(concept, cut(text))
    assert len(found) == expected if isinstance(expected, int) else found == expected


def test_code_is_told_from_prose() -> None:
    lines = "def f(x):\n    return x + 1\n\nprint(f(2));"
    assert len(on("code", cut(lines))) > 10
    assert (
        on("code", cut("We import goods. Then we return home\nand class is over for us all")) == []
    )


def test_line_breaks_are_tokens_too() -> None:
    assert on("line_break", ["one", "\n", "two", " ", "three"]) == ["\n"]


def test_a_character_cut_into_bytes_counts_for_each_of_them() -> None:
    whole, parts = ["a", " “", "go", "”"], ["a", " ⟨E2 80⟩", "⟨9C⟩", "go", "⟨E2 80⟩", "⟨9D⟩"]
    assert on("quoted", whole) == ["go"]
    parts[1] = " "
    parts.insert(2, "⟨E2 80⟩")
    assert on("quoted", parts) == ["go"]
    assert on("quotation_mark", parts) == ["⟨E2 80⟩", "⟨9C⟩", "⟨E2 80⟩", "⟨9D⟩"]


def test_how_a_word_is_cut_changes_nothing() -> None:
    text = 'In 1999 Anna said: "Where are you?" He did not answer (as always).'
    one = concepts_of(cut(text)).any(0)
    other = concepts_of(list(text)).any(0)
    assert torch.equal(one, other)


def test_documents_do_not_see_each_other() -> None:
    texts = dict(enumerate(['"', "go", " house"]))
    tokens = torch.tensor([[0, 1, 0, 2, 2], [0, 1, 2, 0, 2]])
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
    found = concepts_of_contexts(tokens, documents, texts)
    assert found[0, :, NAMES.index("quoted")].tolist() == [False, True, False, False, False]
    assert not found[1, :, NAMES.index("quoted")].any()
    assert found[:, :, NAMES.index("repeated_word")].tolist() == [
        [False, False, False, False, True],
        [False, False, False, False, True],
    ]


@pytest.mark.parametrize("texts", [[], [""], [" "], ["⟨E2⟩"]])
def test_nothing_is_of_no_concept(texts: list[str]) -> None:
    found = concepts_of(texts)
    assert found.shape == (len(texts), len(CONCEPTS))
    assert not found.any()
