"""Ask a judge about many latents: explain, then score with the own and with another's explanation.

A judge that can't be reached costs the latent it was asked about, and is counted; one that answers
nonsense has answered wrongly (`auroc`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sae.evals.judging.auroc import auroc, is_valid
from sae.evals.judging.judge import Confidence, Judge, Unreachable
from sae.evals.judging.questions import Questions

T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """A latent's scores with one explanation; of its answers, how many were none."""

    detection: float
    fuzzing: float
    n_answers: int
    n_invalid: int


@dataclass(frozen=True)
class Answers:
    """What a judge said of the latents asked about, by their numbers.

    `swapped` are verdicts with the explanation of the latent asked about before; `unreached` says
    why, for latents that lack an explanation or a verdict.
    """

    explanations: Mapping[int, str]
    verdicts: Mapping[int, Verdict]
    swapped: Mapping[int, Verdict]
    unreached: Mapping[int, str]


def ask(judge: Judge, questions: Mapping[int, Questions]) -> Answers:
    """Return the judge's answers to all `questions`."""
    unreached: dict[int, str] = {}
    judge.announce(len(questions))

    def explain(number: int) -> str:
        return judge.explain(questions[number].evidence)

    explanations = _each(judge, list(questions), explain, unreached)
    order = list(explanations)
    before = dict(zip(order, order[-1:] + order[:-1], strict=True))

    def own(number: int) -> Verdict:
        return _verdict(judge, explanations[number], questions[number])

    def foreign(number: int) -> Verdict:
        return _verdict(judge, explanations[before[number]], questions[number])

    verdicts = _each(judge, order, own, unreached)
    can_swap = list(verdicts) if len(order) > 1 else []
    return Answers(explanations, verdicts, _each(judge, can_swap, foreign, unreached), unreached)


def _each(
    judge: Judge, numbers: Sequence[int], do: Callable[[int], T], unreached: dict[int, str]
) -> dict[int, T]:
    """Return `do` of each number that could be asked about, in order, and note the others."""

    def tried(number: int) -> T | Unreachable:
        try:
            return do(number)
        except Unreachable as error:
            return error

    with ThreadPoolExecutor(judge.n_at_once) as pool:
        found = dict(zip(numbers, pool.map(tried, numbers), strict=True))
    unreached |= {n: str(value) for n, value in found.items() if isinstance(value, Unreachable)}
    return {n: value for n, value in found.items() if not isinstance(value, Unreachable)}


def _verdict(judge: Judge, explanation: str, asked: Questions) -> Verdict:
    detection = _answers(judge, explanation, asked.firing + asked.silent)
    fuzzing = _answers(judge, explanation, asked.marked + asked.mismarked)
    n, m = len(asked.firing), len(asked.marked)
    answers = detection + fuzzing
    return Verdict(
        auroc(detection[:n], detection[n:]),
        auroc(fuzzing[:m], fuzzing[m:]) if m else math.nan,
        len(answers),
        sum(not is_valid(answer) for answer in answers),
    )


def _answers(judge: Judge, explanation: str, examples: Sequence) -> list[Confidence]:
    """Return one answer for each example; a judge that gives too many or few has given none."""
    if not examples:
        return []
    answers = judge.score(explanation, examples)
    return answers if len(answers) == len(examples) else [None] * len(examples)
