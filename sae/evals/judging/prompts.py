"""What chat models are asked, and how their answers are read: shared by all judges that are one.

Source: prompts ours; the task after Paulo et al. 2024 (arXiv 2410.13928).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from sae.evals.judging.judge import Confidence, Evidence, Example

EXPLAIN = """Each text below has the tokens on which one unit of a neural network fires in «».
Say in one short sentence what these tokens, or what stands before them, have in common. \
Answer with that sentence alone."""
SCORE_TEXTS = """A unit of a neural network is said to fire on: {explanation}
For each of the {n} texts below say how sure you are that it fires somewhere in it, from 0 (no) to \
10 (yes). Answer with a JSON list of {n} numbers alone."""
SCORE_MARKS = """A unit of a neural network is said to fire on: {explanation}
In each of the {n} texts below some tokens are in «». Say how sure you are that it fires on just \
these, from 0 (no) to 10 (yes). Answer with a JSON list of {n} numbers alone."""


def ask_to_explain(evidence: Evidence) -> str:
    """Return the request for an explanation."""
    return _request(EXPLAIN, [e.with_marks(e.firing) for e in evidence.firing])


def read_explanation(answer: str) -> str:
    """Return an explanation on one line."""
    return " ".join(answer.split())


def ask_to_score(explanation: str, examples: Sequence[Example]) -> str:
    """Return the request for numbers from 0 to 10 on each example, or on its marks."""
    has_marks = any(example.marked for example in examples)
    form = SCORE_MARKS if has_marks else SCORE_TEXTS
    texts = [e.with_marks(e.marked) if has_marks else e.text for e in examples]
    return _request(form.format(explanation=explanation or "nothing known", n=len(texts)), texts)


def parse_scores(answer: str, n: int) -> list[Confidence]:
    """Return the first JSON list of `n` numbers in an answer; n times None where there is none."""
    for found in re.findall(r"\[[^\[\]]*\]", answer):
        try:
            numbers = json.loads(found)
        except ValueError:
            continue
        if len(numbers) == n and all(type(number) in (int, float) for number in numbers):
            return [float(number) for number in numbers]
    return [None] * n


def _request(question: str, texts: Sequence[str]) -> str:
    lines = [f"{i}. {json.dumps(t, ensure_ascii=False)}" for i, t in enumerate(texts, 1)]
    return f"{question}\n\n" + "\n".join(lines)
