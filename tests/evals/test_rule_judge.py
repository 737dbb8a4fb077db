"""The judge by rules, and the AUROC of answers."""

from __future__ import annotations

import math

import pytest

from sae.evals.judging.auroc import auroc
from sae.evals.judging.judge import Evidence, Example
from sae.evals.judging.rules import RuleJudge, parse_rules


def example(text: str, fires: str = "", marked: tuple[int, ...] = ()) -> Example:
    """A text of words; the latent fires on those in `fires`."""
    words = [f" {word}" for word in text.split()]
    return Example(tuple(words), tuple(float(w.strip() in fires.split()) for w in words), marked)


SILENT = (example("the sky is blue today"), example("a man of the house"))


def test_a_word_is_found_whatever_its_case() -> None:
    firing = (example("the Dog ran home", "Dog"), example("a dog of ours", "dog"))
    said = RuleJudge().explain(Evidence(firing, SILENT))
    assert said.startswith('token "dog" 100%')


def test_a_place_after_a_word_is_found() -> None:
    firing = (example("king of spain", "spain"), example("queen of france", "france"))
    assert '"of"' in RuleJudge().explain(Evidence(firing, SILENT))


def test_a_kind_is_found_where_no_word_is_shared() -> None:
    firing = tuple(example(f"in {n} he left {n + 7} men", f"{n} {n + 7}") for n in (12, 34, 56))
    assert 'kind "number" 100%' in RuleJudge().explain(Evidence(firing, SILENT))


def test_rules_are_applied_as_written() -> None:
    judge = RuleJudge()
    said = 'token "dog" 90%; after "of" 40%'
    assert parse_rules(said) == {("token", "dog"): 0.9, ("after", "of"): 0.4}
    texts = [example("my dog"), example("king of spain"), example("nothing")]
    assert judge.score(said, texts) == [0.9, 0.4, 0.0]
    marks = [example("my dog ran", marked=(1,)), example("my dog ran", marked=(1, 2))]
    assert judge.score(said, marks) == pytest.approx([0.9, 0.45])


def test_words_that_are_no_rule_get_no_answer() -> None:
    assert RuleJudge().score("dogs and cats", [example("my dog")]) == [None]


def test_nothing_found_says_the_same_to_all() -> None:
    judge = RuleJudge()
    assert judge.explain(Evidence((), SILENT)) == ""
    assert judge.score("", list(SILENT)) == [0.0, 0.0]


def test_auroc_counts_pairs() -> None:
    assert auroc([3, 1], [2, 0]) == 0.75
    assert auroc([1.0], [1.0]) == 0.5
    assert auroc([None, 2], [1, 0]) == 0.5
    assert auroc([2], [None, 1]) == 0.5
    assert auroc([math.nan], [0]) == 0
    assert math.isnan(auroc([], [1]))


def test_marks_join_neighbours() -> None:
    assert example("a b c d").with_marks((1, 2)) == " a« b c» d"
    assert example("a b").with_marks((1,)) == " a« b»"
