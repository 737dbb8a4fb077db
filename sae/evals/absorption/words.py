"""Absorption, splitting and hedging in text: words that begin alike, and nouns of a kind.

Two hierarchies of whole words: `letter`, whose concepts are the words that begin with A, B, … Z,
and `noun`, whose concepts are WordNet's noun classes (`wordnet`). The children are the single words
that are frequent enough. A row is the last token of a word; a concept's direction is the
discriminant of its words against all others, `says` is on which side a row lies, and a child's
direction is the difference of its mean from the other words' of its concept. Formulas: `concepts`.

Rows of documents of one half choose directions and main latents, the other half's score them.
Source: Chanin et al. 2024 (arXiv 2409.14507). Deviations: words in running text, not in a prompt
that asks to spell them; a regularised linear discriminant in place of a logistic probe.
Memory: CLASS_ROWS rows of each class and half, with x and their codes. Cost: a second or two.
Cannot see: what a latent does within a word; concepts that the model itself does not tell (then
nothing is detected).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae.coder.latents import Latents
from sae.evals.absorption.concepts import COLUMNS, LEAST_ROWS, Directions, Rows, judged
from sae.evals.absorption.scores import labels_of, metrics_of, undefined
from sae.evals.absorption.wordnet import CLASSES, NounClasses
from sae.evals.concepts import placed, runs
from sae.evals.interface import ContextBatch, EvalSetup, Seen, Value
from sae.evals.numbers import HALVES, halves_of, token_numbers
from sae.evals.probing.sample import RowSample
from sae.evals.targeted import Probes
from sae.stream.vocabulary import token_texts

CLASS_ROWS = 256
# A word at a document's end may go on behind what the context holds.
WORD = re.compile(r"(?<=\s)[A-Za-z]+(?=[^\w])")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
WRITES_ELSEWHERE = "the dictionary writes elsewhere than it reads, so its rows are no concepts' own"
NO_TEXT = "the activations come from no language model, so that no token has a text"
TOO_FEW = "fewer than two of its concepts have words in both halves of the documents"
LABELS = labels_of("letter_absorption", "first letters of words") | labels_of(
    "noun_absorption", "noun classes"
)
CANNOT_SEE = ("permuted decoder", "noise fitting", "concepts that the model does not tell")

ClassOf = Callable[[str], int | None]


def letter_of(word: str) -> int | None:
    """Return the number of a word's first letter."""
    return LETTERS.index(word[0]) if word[0] in LETTERS else None


class Hierarchy(NamedTuple):
    """Rows of words by class: `prefix` of its metrics, `names` of its classes, `rows` of words."""

    prefix: str
    names: Sequence[str]
    class_of: ClassOf
    rows: RowSample


class AbsorptionWords:
    """Accumulates what `LABELS` lists."""

    def __init__(self, setup: EvalSetup) -> None:
        self.setup, self.seen = setup, Seen()
        self.missing: dict[str, str] = {}
        self.hierarchies = [_hierarchy("letter_absorption", LETTERS, letter_of)]
        try:
            nouns = NounClasses(setup.settings.wordnet)
            self.hierarchies.append(_hierarchy("noun_absorption", CLASSES, nouns))
        except RuntimeError as error:
            self.missing["noun_absorption"] = str(error)
        self._texts: dict[int, str] = {}
        self._has_text = False
        self._tables: dict[str, Tensor] = {}

    def update(self, batch: ContextBatch) -> None:
        """Add a batch of contexts; those without text are only counted."""
        kept = batch.kept.cpu()
        contexts = batch.contexts
        documents = contexts.document_ids.cpu().flatten()[kept]
        self.seen.update(documents)
        if batch.lm is None:
            return
        self._has_text = True
        self._tables.clear()
        new = [i for i in contexts.tokens.unique().tolist() if i not in self._texts]
        self._texts |= zip(new, token_texts(batch.lm.tokenizer, new), strict=True)
        words = words_at(contexts.tokens.cpu(), contexts.document_ids.cpu(), self._texts)
        rows = [row for row, place in enumerate(kept.tolist()) if place in words]
        if not rows:
            return
        said = [words[place] for place in kept[rows].tolist()]
        tags = torch.tensor([zlib.crc32(word.encode()) for word in said])
        flat = contexts.activations.flatten(0, 1)
        x = flat[kept[rows].to(flat.device)].cpu()
        code = Latents(*(part.cpu()[rows] for part in batch.latents))
        numbers = token_numbers(contexts, kept, self.setup.seed)[rows]
        halves = halves_of(documents[rows], self.setup.seed)
        for hierarchy in self.hierarchies:
            cells = _cells([hierarchy.class_of(word) for word in said], halves, hierarchy.names)
            hierarchy.rows.update(numbers, cells, x, code, tags)

    def merge(self, other: AbsorptionWords) -> None:
        """Add another's words."""
        self.seen.merge(other.seen)
        self._has_text |= other._has_text
        self._tables.clear()
        for own, theirs in zip(self.hierarchies, other.hierarchies, strict=True):
            own.rows.merge(theirs.rows)

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module, with intervals over concepts."""
        found: dict[str, Value] = {}
        for hierarchy in self.hierarchies:
            table = self._table(hierarchy)
            found |= (
                undefined(hierarchy.prefix, self._why_not())
                if table is None
                else metrics_of(hierarchy.prefix, table, torch.ones(len(table)).bool(), self.setup)
            )
        for prefix, reason in self.missing.items():
            found |= undefined(prefix, reason)
        return found

    def arrays(self) -> Mapping[str, Tensor]:
        """Return each concept's values, in the order of COLUMNS."""
        found = {}
        for hierarchy in self.hierarchies:
            table = self._table(hierarchy)
            if table is not None:
                columns = zip(COLUMNS, table.T.contiguous(), strict=True)
                found |= {f"{hierarchy.prefix}/{name}": column for name, column in columns}
        return found

    @property
    def _writes_elsewhere(self) -> bool:
        coder = self.setup.coder
        return coder is not None and coder.sites.writes is not None

    def _why_not(self) -> str:
        if not self._has_text:
            return NO_TEXT
        return WRITES_ELSEWHERE if self._writes_elsewhere else TOO_FEW

    def _table(self, hierarchy: Hierarchy) -> Tensor | None:
        """Return the values of every class, NaN for those without words; None where all are."""
        sample = hierarchy.rows
        has = sample.has.view(len(hierarchy.names), HALVES, -1)
        is_there = (has.sum(2) >= LEAST_ROWS).all(1)
        if not self._has_text or self._writes_elsewhere or int(is_there.sum()) < 2:
            return None
        if hierarchy.prefix not in self._tables:
            values, _ = judged(*self._rows(sample, is_there))
            table = torch.full((len(is_there), len(COLUMNS)), torch.nan, dtype=torch.float64)
            table[is_there] = values
            self._tables[hierarchy.prefix] = table
        return self._tables[hierarchy.prefix]

    def _rows(self, sample: RowSample, is_there: Tensor) -> tuple[Rows, Tensor, Directions]:
        has = sample.has & is_there.repeat_interleave(HALVES)[:, None]
        group = has.nonzero()[:, 0]
        is_on = torch.nn.functional.one_hot(group // HALVES, len(is_there)).bool()[:, is_there]
        is_train = group % HALVES == 0
        x, tags = sample.x[has], sample.tags[has]
        is_child, pairs = _children(tags, is_on, is_train)
        fitted = Probes(x[is_train], is_on[is_train])
        unit = fitted.probes / fitted.probes.norm(dim=0).clamp_min(1e-12)
        coder = self.setup.coder
        directions = Directions(
            unit.T,
            _differences(x[is_train], is_child[is_train], is_on[is_train], pairs),
            torch.zeros(self.setup.d_sae, x.shape[1])
            if coder is None
            else coder.directions().float().cpu(),
            None if coder is None else coder.encoder_rows(),
        )
        code = Latents(sample.values[has], sample.indices[has])
        along, says = (x - fitted.mean) @ unit, fitted.scores(x) > 0
        return Rows(code, is_on, is_child, along, says, is_train), pairs, directions


def words_at(tokens: Tensor, document_ids: Tensor, texts: Mapping[int, str]) -> dict[int, str]:
    """Return the whole words, in small letters, that end at places of the flattened (b, t)."""
    return {
        row * tokens.shape[1] + place: word
        for row, (ids, documents) in enumerate(zip(tokens, document_ids, strict=True))
        for start, end in runs(documents)
        for place, word in _words([texts[i] for i in ids[start:end].tolist()], start)
    }


def _words(texts: Sequence[str], first: int) -> Iterator[tuple[int, str]]:
    """Yield each word of letters between spaces or signs with the place of its last token."""
    text, spans = placed(texts)
    last = {end: place for place, (_, end) in enumerate(spans)}
    for match in WORD.finditer(text):
        if match.end() in last:
            yield first + last[match.end()], match[0].lower()


def _hierarchy(prefix: str, names: Sequence[str], class_of: ClassOf) -> Hierarchy:
    return Hierarchy(prefix, names, class_of, RowSample(HALVES * len(names), CLASS_ROWS))


def _cells(classes: Sequence[int | None], halves: Tensor, names: Sequence[str]) -> Tensor:
    """Return which group each word is in, (n, HALVES · classes) bool; none without a class."""
    number = torch.tensor([-1 if one is None else one for one in classes])
    group = torch.where(number >= 0, number * HALVES + halves, -1)
    return group[:, None] == torch.arange(HALVES * len(names))


def _children(tags: Tensor, is_on: Tensor, is_train: Tensor) -> tuple[Tensor, Tensor]:
    """Return is_child (n, children) and pairs, of words with enough rows in both halves."""
    words, which = tags.unique(return_inverse=True)
    counts = [torch.bincount(which[rows], minlength=len(words)) for rows in (is_train, ~is_train)]
    words = words[torch.stack(counts).amin(0) >= LEAST_ROWS]
    is_child = tags[:, None] == words
    parents = [int(is_on[column].int()[0].argmax()) for column in is_child.T]
    pairs = torch.tensor(list(zip(parents, range(len(words)), strict=True)), dtype=torch.int64)
    return is_child, pairs.view(-1, 2)


def _differences(x: Tensor, is_child: Tensor, is_on: Tensor, pairs: Tensor) -> Tensor:
    """Return the mean of each child's rows less that of its concept's others, (children, d)."""
    rows = torch.zeros(is_child.shape[1], x.shape[1])
    for parent, child in pairs.tolist():
        own = is_child[:, child]
        others = is_on[:, parent] & ~own
        if others.any():
            rows[child] = x[own].mean(0) - x[others].mean(0)
    return rows
