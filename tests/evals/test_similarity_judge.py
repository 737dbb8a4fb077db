"""The judge by likeness to quoted texts."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from judging_texts import SETUP, text_batch
from test_rule_judge import SILENT, example
from torch import Tensor

from sae.config import EvalConfig
from sae.evals.judging.autointerp import Autointerp
from sae.evals.judging.judge import Evidence
from sae.evals.judging.judges import make_judge
from sae.evals.judging.similarity import SimilarityJudge, hashed_ngrams, quoted

JUDGE = make_judge(EvalConfig(judge="similarity"))
FIRING = tuple(
    example(text, "dog") for text in ("his small dog ran", "one big dog slept", "my dog came here")
)


def test_it_quotes_what_the_firing_texts_have_in_common() -> None:
    odd = example("seven purple clouds", "purple")
    said = quoted(JUDGE.explain(Evidence((*FIRING, odd), SILENT)))
    assert all("dog" in text for text in said[:3])
    assert "purple" in said[-1]
    assert JUDGE.explain(Evidence((), SILENT)) == ""


def test_what_is_like_the_quoted_scores_higher() -> None:
    said = JUDGE.explain(Evidence(FIRING, SILENT))
    texts = [example("here is a dog again"), example("king of spain and france")]
    near, far = JUDGE.score(said, texts)
    assert near is not None
    assert far is not None
    assert near > far
    marks = [example("his dog of spain and france", marked=(place,)) for place in (1, 5)]
    right, wrong = JUDGE.score(said, marks)
    assert right > wrong  # type: ignore[operator]


@pytest.mark.parametrize("words", ["dogs and other pets", "[]", "[1, 2]", ""])
def test_words_of_others_are_embedded_as_they_are(words: str) -> None:
    assert quoted(words) == [words]
    assert all(value is not None for value in JUDGE.score(words, [example("a dog")]))
    assert quoted(json.dumps(["a dog"])) == ["a dog"]


def test_hashed_ngrams_are_unit_and_do_not_see_case() -> None:
    vectors = hashed_ngrams(["The dog ran", "the  DOG ran", "", "a cat"])
    torch.testing.assert_close(vectors.norm(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert torch.equal(vectors[0], vectors[1])
    assert abs(float(vectors[0] @ vectors[3])) < 0.5


def test_autointerp_by_likeness_and_its_nulls() -> None:
    """Latents that are words are found; shuffled latents and swapped explanations are chance."""
    found = _metrics(shuffle=False)
    assert found["detection_auroc"] > 0.85
    assert found["fuzzing_auroc"] > 0.85
    assert found["judge_invalid"] == 0
    assert found["detection_auroc_swapped/low"] <= 0.5 <= found["detection_auroc_swapped/high"]
    shuffled = _metrics(shuffle=True)
    for score in ("detection_auroc", "fuzzing_auroc"):
        assert shuffled[f"{score}/low"] <= 0.5 <= shuffled[f"{score}/high"], score


def test_the_embedder_decides() -> None:
    def first_letters(texts: Sequence[str]) -> Tensor:
        codes = [ord(text.strip()[0]) % 8 if text.strip() else 0 for text in texts]
        return torch.nn.functional.one_hot(torch.tensor(codes), 8).float()

    judge = SimilarityJudge(first_letters)
    assert judge.score('["dog"]', [example("dull"), example("apt")]) == [1.0, 0.0]


def test_the_setting_names_the_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_lengths(texts: Sequence[str]) -> Tensor:
        lengths = torch.tensor([len(text) for text in texts])
        return torch.nn.functional.one_hot(lengths % 8, 8).float()

    monkeypatch.setattr("sae.evals.judging.similarity.sentence_encoder", lambda: of_lengths)
    judge = make_judge(EvalConfig(judge="similarity", embedder="minilm"))
    assert judge.name == "similarity by minilm"
    assert judge.score('["cat"]', [example("dog"), example("horse")]) == [1.0, 0.0]
    words = make_judge(EvalConfig(judge="similarity"))
    assert words.name == "similarity"
    assert words.score('["cat"]', [example("dog"), example("cat")])[0] < 0.5


def _metrics(*, shuffle: bool) -> dict[str, float]:
    autointerp = Autointerp(SETUP, SimilarityJudge())
    autointerp.update(text_batch(shuffle=shuffle))
    found = autointerp.compute()
    return {name: value for name, value in found.items() if isinstance(value, float)}
