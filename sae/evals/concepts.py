"""Concepts that rules can name: which tokens of a text are digits, capitals, quoted, French, code.

The one idea: a rule reads the whole text and gives spans of characters; a token is of the concept
where it holds a character of a span that is no space (any character, where the span is all space).
So a rule sees what stands around a token, and does not depend on how a tokenizer cuts. Rules are
fixed and deterministic; `CONCEPTS` has them by name, `concepts_of` applies them all.

A rule sees one document, from where the context that holds it begins: what a context cuts off
(an opening quotation mark, the beginning of a sentence) is not known.
Cannot see: what takes understanding; a rule is a stand-in for its concept, and errs where the
concept's form does (a name at a sentence's beginning is no `name_inside`).
Source: ours; part-of-speech classes are English lists of closed classes.
Cost: some 45 regular expressions over the text once, about 5 µs a token.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sae.stream.vocabulary import to_bytes

Span = tuple[int, int]
Rule = Callable[[str], Iterable[Span]]


def concepts_of(texts: Sequence[str]) -> Tensor:
    """Return which concepts each token is of, (t, len(CONCEPTS)) bool.

    Args:
        texts: of consecutive tokens of one document, as `token_texts` gives them.
    """
    text, tokens = placed(texts)
    is_space = [character.isspace() for character in text]
    table = torch.zeros(len(texts), len(CONCEPTS), dtype=torch.bool)
    for column, rule in enumerate(CONCEPTS.values()):
        is_on = _marked(rule(text), is_space)
        hits = [place for place, (start, end) in enumerate(tokens) if any(is_on[start:end])]
        table[hits, column] = True
    return table


def concepts_of_contexts(tokens: Tensor, document_ids: Tensor, texts: Mapping[int, str]) -> Tensor:
    """Return which concepts each token of contexts is of, (b, t, len(CONCEPTS)) bool.

    Shapes: tokens, document_ids (b, t) int64, on the CPU; texts has the text of every id in them.
    """
    found = torch.zeros(*tokens.shape, len(CONCEPTS), dtype=torch.bool)
    for row, (ids, documents) in enumerate(zip(tokens, document_ids, strict=True)):
        for start, end in runs(documents):
            found[row, start:end] = concepts_of([texts[i] for i in ids[start:end].tolist()])
    return found


def runs(document_ids: Tensor) -> Iterator[Span]:
    """Yield where each run of equal numbers (t) begins and ends."""
    ends = (document_ids[1:] != document_ids[:-1]).nonzero()[:, 0] + 1
    edges = [0, *ends.tolist(), len(document_ids)]
    yield from pairwise(edges)


def placed(texts: Sequence[str]) -> tuple[str, list[Span]]:
    """Return the joined text, and each token's characters; bytes of one all have that one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    parts: list[str] = []
    spans: list[Span] = []
    n = 0
    for text in texts:
        part = decoder.decode(to_bytes(text))
        spans.append((n, n + max(len(part), 1)))
        parts.append(part)
        n += len(part)
    return "".join(parts) + decoder.decode(b"", final=True), spans


def _marked(spans: Iterable[Span], is_space: list[bool]) -> list[bool]:
    is_on = [False] * len(is_space)
    for start, end in spans:
        all_space = all(is_space[start:end])
        for place in range(start, end):
            is_on[place] = is_on[place] or all_space or not is_space[place]
    return is_on


def pattern(expression: str, *, any_case: bool = False) -> Rule:
    """Return the rule of a regular expression: its group 1 where it has one, else all of it."""
    compiled = re.compile(expression, re.MULTILINE | (re.IGNORECASE if any_case else 0))
    group = 1 if compiled.groups else 0
    return lambda text: (match.span(group) for match in compiled.finditer(text))


def words(listed: str) -> Rule:
    """Return the rule of a list of words, in any case."""
    return pattern(rf"\b(?:{'|'.join(listed.split())})\b", any_case=True)


def _repeated(text: str) -> Iterator[Span]:
    """Words of at least four letters that the document had before."""
    seen: set[str] = set()
    for match in re.finditer(r"[^\W\d_]{4,}", text):
        if match[0].lower() in seen:
            yield match.span()
        seen.add(match[0].lower())


_CODE = re.compile(
    r"^\s*(?:def|class|import|from \w+ import|return|elif|for \w+ in|while \(|if \(|else:|try:"
    r"|#include|public|private|static|void|function|var|let|const|int|package|using)\b.*$"
    r"|^.*[;{}]\s*$|^.*\w\([^()\n]*\)\s*[:{;].*$|^\s*(?://|/\*|#!).*$|^.*(?:==|=>|->|::|\+=|&&).*$",
    re.MULTILINE,
)


def _code(text: str) -> Iterator[Span]:
    """Lines that look like code, where at least a third of the lines do."""
    found = [match.span() for match in _CODE.finditer(text) if match[0].strip()]
    n_lines = sum(bool(line.strip()) for line in text.splitlines())
    if found and 3 * len(found) >= n_lines and n_lines > 1:
        yield from found


_FUNCTION_WORDS = {
    "english": "the of and to in is that it was for on with as at by this be are have from not but",
    "french": "le la les des du et un une est dans que qui pour pas sur avec au ce il elle sont",
    "german": "der die das und ist nicht ein eine mit von zu den auf für dem im sich auch es wird",
    "spanish": "el los las de y en que un una es por con para del se su al lo como más pero está",
    "italian": "il lo gli di e che un una è per con del della non si sono nel dei anche alla più",
    "portuguese": "o os as de e que um uma é por com para do da não se no na dos mais ao em seu",
    "dutch": "de het een en van is dat op te zijn met voor niet aan er om ook als door bij naar",
}
_LISTS = {name: frozenset(listed.split()) for name, listed in _FUNCTION_WORDS.items()}
_LEAST_WORDS, _LEAST_SHARE = 3, 0.2


def language(name: str) -> Rule:
    """Return the rule of sentences whose function words are most often this language's."""

    def find(text: str) -> Iterator[Span]:
        for sentence in re.finditer(r"[^.!?\n]+", text):
            tokens = re.findall(r"[^\W\d_]+", sentence[0].lower())
            counts = {other: sum(t in listed for t in tokens) for other, listed in _LISTS.items()}
            mine = counts.pop(name)
            enough = mine >= max(_LEAST_WORDS, _LEAST_SHARE * len(tokens))
            if enough and mine > max(counts.values()):
                yield sentence.span()

    return find


_MONTHS = "January February March April May June July August September October November December"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_NUMBERS = "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty"

CONCEPTS: dict[str, Rule] = {
    "digit": pattern(r"\d+"),
    "year": pattern(r"\b(?:1[5-9]|20)\d\d\b"),
    "money": pattern(r"[$€£¥]\s?\d[\d,.]*"),
    "percent": pattern(r"\d[\d.,]*\s?(?:%|percent\b)"),
    "number_word": words(f"{_NUMBERS} hundred thousand million billion first second third"),
    "date_word": pattern(rf"\b(?:{'|'.join(f'{_MONTHS} {_DAYS}'.split())})\b"),
    "capitalised": pattern(r"\b[A-Z][a-z]+"),
    "all_capitals": pattern(r"\b[A-Z]{2,}\b"),
    "name_inside": pattern(r"(?<=[a-z,;] )[A-Z][a-z]+"),
    "title": pattern(r"\b(?:Mr|Mrs|Ms|Dr|Prof|Sen|Gov|President|Senator|Minister|King|Queen)\b"),
    "sentence_start": pattern(r"(?:\A\s*|[.!?][\"'”’)]*\s+|\n\s*)([^\W_]+)"),
    "sentence_end": pattern(r"[.!?](?=[\"'”’)]*(?:\s|\Z))"),
    "question": pattern(r"[^.!?\n]+\?"),
    "exclamation": pattern(r"[^.!?\n]+!"),
    "quoted": pattern(r"[\"“]([^\"“”\n]{1,300})[\"”]"),
    "quotation_mark": pattern(r"[\"“”]"),
    "bracketed": pattern(r"\(([^()\n]{1,300})\)"),
    "comma": pattern(r","),
    "dash": pattern(r"[–—]|--|(?<=\s)-(?=\s)"),
    "colon": pattern(r"[:;]"),
    "apostrophe": pattern(r"(?<=\w)['’]\w*"),
    "line_break": pattern(r"\n+"),
    "web_address": pattern(r"https?://\S+|www\.\S+|\b[\w-]+\.(?:com|org|net|edu|gov)\b\S*"),
    "handle": pattern(r"[@#]\w+"),
    "markup": pattern(r"</?[A-Za-z][^<>\n]*>"),
    "code": _code,
    "sum": pattern(r"\d\s*[-+*/=<>^×÷]\s*\d+|\\[a-zA-Z]+"),
    "hyphenated": pattern(r"\b\w+(?:-\w+)+\b"),
    "inside_word": pattern(r"(?<=[^\W\d_]{4})[^\W\d_]+"),
    "repeated_word": _repeated,
    "article": words("the a an"),
    "pronoun": words("i you he she it we they me him her us them my your his its our their"),
    "male_pronoun": words("he him his himself"),
    "female_pronoun": words("she her hers herself"),
    "preposition": words("of in on at by for with from to into over under after before between"),
    "conjunction": words("and or but because although while if unless since"),
    "negation": pattern(r"\b(?:not|no|never|none|nothing|cannot)\b|\b\w+n['’]t\b", any_case=True),
    "modal": words("can could may might must shall should will would"),
    "question_word": words("who whom whose what which when where why how"),
    "form_of_be": words("be am is are was were been being"),
    "speech_verb": words("say says said tell told ask asked add added write wrote explain claim"),
    "past_tense": pattern(r"\b[a-z]{2,}ed\b"),
    "ing_form": pattern(r"\b[a-z]{2,}ing\b"),
    "adverb": pattern(r"\b[a-z]{3,}ly\b"),
    **{name: language(name) for name in _LISTS if name != "english"},
    "cyrillic": pattern(r"[\u0400-\u04FF]+"),
    "greek": pattern(r"[\u0370-\u03FF]+"),
    "arabic": pattern(r"[\u0600-\u06FF]+"),
    "east_asian": pattern(r"[\u3040-\u30FF\u3400-\u9FFF\uAC00-\uD7AF]+"),
}
"""Every concept by name, in the order of `concepts_of`'s columns."""
