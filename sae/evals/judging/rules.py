"""A judge without a model: it explains by rules on tokens, and applies what it wrote.

A rule says of one token whether it applies; letters' case and spaces around do not count:
    token "dog"       the token is dog          after "of"      the token before it is of
    pair "of the"     both: the, after of       within "cat"    cat is among the 8 before it
    kind "number"     the token matches a regular expression (`KINDS`)
An explanation is at most `MAX_RULES` of them with the share of their tokens that fired in the
evidence, strongest first, such as
    token "dog" 93%; after "of" 41%
found greedily: each next rule is the one with the largest precision · (firing tokens that no rule
before it covers). A text scores the largest share of the rules that apply to any of its tokens,
marked tokens the mean of theirs. Words that are no such rule get no answer.
Deterministic, offline; a fraction of a second a latent.
Source: ours; rules on tokens and their neighbours after Bills et al. 2023, "Language models can
explain neurons in language models" (token look-up baseline).
Cannot see: anything that takes understanding (topics, roles, sentiment), so it sets a floor: a
latent that it explains is simple, one that it does not explain may be fine.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from sae.evals.judging.judge import Confidence, Evidence, Example

MAX_RULES = 6
MIN_COVERED = 2
REACH = 8
KINDS = {
    "number": re.compile(r"\d+"),
    "capitalised": re.compile(r"[A-Z][a-z]+"),
    "capitals": re.compile(r"[A-Z]{2,}"),
    "punctuation": re.compile(r"[.,;:!?]+"),
    "bracket": re.compile(r"[()\[\]{}<>]+"),
    "quote": re.compile("[\"'`“”‘’]+"),
    "space": re.compile(r"\s*"),
    "symbol": re.compile(r"[^\w\s]+"),
    "not ascii": re.compile(r".*[^\x00-\x7f].*", re.DOTALL),
}
_RULE = re.compile(r'(token|after|pair|within|kind) ("(?:[^"\\]|\\.)*") (\d+)%')

Rule = tuple[str, str]


class RuleJudge:
    """The judge of this module."""

    name = "rules"
    n_at_once = 1

    def announce(self, _: int) -> None:
        """Say nothing: rules cost nothing."""

    def explain(self, evidence: Evidence) -> str:
        """Return the rules that tell firing tokens from others, "" where none does."""
        fired, others = _count_rules(evidence)
        total = Counter({rule: len(places) for rule, places in fired.items()}) + others
        chosen: list[tuple[float, Rule]] = []
        left = {place for places in fired.values() for place in places}
        while left and len(chosen) < MAX_RULES:
            gains = {
                rule: len(places & left) * len(places) / (total[rule] + 1)
                for rule, places in fired.items()
            }
            rule = min(gains, key=lambda name: (-gains[name], name))
            if len(fired[rule] & left) < min(MIN_COVERED, len(left)):
                break
            chosen.append((len(fired[rule]) / total[rule], rule))
            left -= fired.pop(rule)
        chosen.sort(key=lambda pair: (-pair[0], pair[1]))
        return "; ".join(
            f"{kind} {json.dumps(word, ensure_ascii=False)} {max(round(100 * share), 1)}%"
            for share, (kind, word) in chosen
        )

    def score(self, explanation: str, examples: Sequence[Example]) -> list[Confidence]:
        """Return the rules' shares; None for words that hold no rule."""
        rules = parse_rules(explanation)
        if explanation and not rules:
            return [None] * len(examples)
        return [_score(rules, example) for example in examples]


def parse_rules(explanation: str) -> dict[Rule, float]:
    """Return each rule of an explanation with its share."""
    found = _RULE.findall(explanation)
    return {(kind, json.loads(word)): int(percent) / 100 for kind, word, percent in found}


def _score(rules: dict[Rule, float], example: Example) -> float:
    places = list(enumerate(_rules_by_token(example.tokens)))
    shares = [
        max((rules.get(rule, 0.0) for rule in applying), default=0.0) for _, applying in places
    ]
    if not example.marked:
        return max(shares, default=0.0)
    return sum(shares[place] for place in example.marked) / len(example.marked)


def _count_rules(evidence: Evidence) -> tuple[dict[Rule, set[tuple[int, int]]], Counter[Rule]]:
    """Return where each rule applies to a token that fires, and how often to one that does not."""
    fired: dict[Rule, set[tuple[int, int]]] = {}
    others: Counter[Rule] = Counter()
    for number, example in enumerate((*evidence.firing, *evidence.silent)):
        firing = set(example.firing)
        for place, rules in enumerate(_rules_by_token(example.tokens)):
            if place not in firing:
                others.update(rules)
                continue
            for rule in rules:
                fired.setdefault(rule, set()).add((number, place))
    return fired, Counter({rule: others[rule] for rule in fired})


def _rules_by_token(tokens: Iterable[str]) -> Iterator[set[Rule]]:
    """Yield for each token all rules that apply to it."""
    before: list[str] = []
    for token in tokens:
        word = token.strip().lower() or token
        rules = {("token", word)}
        rules |= {("kind", name) for name, form in KINDS.items() if form.fullmatch(token.strip())}
        rules |= {("within", other) for other in before[-REACH:]}
        if before:
            rules |= {("after", before[-1]), ("pair", f"{before[-1]} {word}")}
        before.append(word)
        yield rules
