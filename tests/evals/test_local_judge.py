"""The judge that is a model on this machine: a tiny random one, and one that answers well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_answers import word_reader
from judging_texts import SETUP, text_batch
from test_rule_judge import SILENT, example

from sae.config import EvalConfig
from sae.evals.judging.auroc import auroc
from sae.evals.judging.autointerp import Autointerp
from sae.evals.judging.judge import Evidence, Example
from sae.evals.judging.judges import make_judge
from sae.evals.judging.local_model import LocalModelJudge
from sae.stream.language_model import LanguageModel

FIRING = (example("a dog", "dog"), example("my dog", "dog"))


class Wise(LocalModelJudge):
    """Answers as the model of a reader of words would."""

    def answer(self, content: str, n_tokens: int) -> str:
        assert n_tokens > 0
        return word_reader(content)


@pytest.fixture
def judge(lm: LanguageModel, tiny_lm_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The tiny random model, whose context is made long enough for the requests."""
    monkeypatch.setattr(lm.module.config, "max_position_embeddings", 2048)
    one = make_judge(EvalConfig(judge="local_model", judge_model=str(tiny_lm_folder)))
    assert isinstance(one, LocalModelJudge)
    one._loaded = lm
    return one


def test_a_random_model_answers_nonsense_which_is_wrong(judge: LocalModelJudge) -> None:
    said = judge.explain(Evidence(FIRING, SILENT))
    assert said
    assert "\n" not in said
    answers = judge.score(said, [example("my dog"), example("the sky")])
    assert answers == [None, None]
    assert auroc(answers[:1], answers[1:]) == 0


def test_it_answers_by_its_most_likely_tokens(judge: LocalModelJudge) -> None:
    torch.manual_seed(1)
    first = judge.answer("what?", 6)
    torch.manual_seed(2)
    assert judge.answer("what?", 6) == first
    assert first


def test_the_chat_template_is_used(judge: LocalModelJudge, lm, monkeypatch) -> None:
    seen: list[str] = []
    decode = lm.tokenizer.decode
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}the answer"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    generate = lm.module.generate

    def kept(ids, **given):
        seen.append(decode(ids[0]))
        return generate(ids, **given)

    monkeypatch.setattr(lm.module, "generate", kept, raising=False)
    judge.answer("dogs and cats", 2)
    assert "user" in seen[0]
    assert "dogs and cats" in seen[0]
    assert seen[0].endswith("the answer")


def test_a_request_beyond_the_context_is_no_answer(lm, tiny_lm_folder: Path, caplog) -> None:
    judge = LocalModelJudge(EvalConfig(judge="local_model", judge_model=str(tiny_lm_folder)))
    judge._loaded = lm  # of 128 positions
    assert judge.score("dogs", [example("a long text " * 40)] * 3) == [None] * 3
    assert "too long" in caplog.text


def test_it_loads_the_model_that_is_named(tiny_lm_folder: Path) -> None:
    judge = LocalModelJudge(EvalConfig(judge="local_model", judge_model=str(tiny_lm_folder)))
    assert judge._model().name == str(tiny_lm_folder)
    assert judge.name == str(tiny_lm_folder)


def test_a_missing_name_is_said_first() -> None:
    with pytest.raises(ValueError, match="judge_model"):
        make_judge(EvalConfig(judge="local_model"))


@pytest.mark.parametrize("name", ["package:no-such-judge", "./no-such-folder"])
def test_a_name_that_is_no_model_s_is_said_before_anything_is_asked(name: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match="no-such") as error:
        make_judge(EvalConfig(judge="local_model", judge_model=name))
    assert "model.name" not in str(error.value)


def test_autointerp_by_a_model_and_its_nulls(tiny_lm_folder: Path) -> None:
    model = str(tiny_lm_folder)
    settings = EvalConfig(judge_latents=24, judge_examples=12, judge_model=model)
    found = [_metrics(settings, shuffle=shuffle) for shuffle in (False, True)]
    assert found[0]["detection_auroc"] > 0.9
    assert found[0]["judge_invalid"] == 0
    for name in ("detection_auroc", "fuzzing_auroc"):
        assert found[1][f"{name}/low"] <= 0.5 <= found[1][f"{name}/high"], name
    low, high = (found[0][f"detection_auroc_swapped/{end}"] for end in ("low", "high"))
    assert low <= 0.5 <= high


def test_questions_do_not_show_activations(tiny_lm_folder: Path) -> None:
    asked: list[str] = []

    class Listening(Wise):
        def answer(self, content: str, n_tokens: int) -> str:
            asked.append(content)
            return super().answer(content, n_tokens)

    judge = Listening(EvalConfig(judge_model=str(tiny_lm_folder)))
    judge.score("the word dog", [Example((" a", " dog")), Example((" a", " cat"))])
    assert "«" not in asked[0].splitlines()[-1]
    assert json.loads(word_reader(asked[0])) == [10, 0]


def _metrics(settings: EvalConfig, *, shuffle: bool) -> dict[str, float]:
    autointerp = Autointerp(replace(SETUP, settings=settings), Wise(settings))
    autointerp.update(text_batch(shuffle=shuffle))
    found = autointerp.compute()
    return {name: value for name, value in found.items() if isinstance(value, float)}
