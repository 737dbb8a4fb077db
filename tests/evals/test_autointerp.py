"""The eval that asks judges: it finds what is there, and nothing where there is nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from judging_texts import D_SAE, SETTINGS, SETUP, part_of, text_batch

from sae.config import EvalConfig
from sae.evals.interface import Undefined
from sae.evals.judging.autointerp import LABELS, Autointerp
from sae.evals.judging.judge import Confidence, Evidence, Example, Unreachable
from sae.evals.judging.rules import RuleJudge
from sae.evals.judging.sampling import _View


class Nonsense(RuleJudge):
    """Answers no question."""

    def score(self, _: str, examples: Sequence[Example]) -> list[Confidence]:
        return [None] * len(examples)


class Talkative(RuleJudge):
    """Gives one answer too many."""

    def score(self, explanation: str, examples: Sequence[Example]) -> list[Confidence]:
        return [*super().score(explanation, examples), 1.0]


class Away(RuleJudge):
    """Can't be asked."""

    def explain(self, _: Evidence) -> str:
        raise Unreachable("no route to the judge")


class OftenAway(RuleJudge):
    """Can't be asked about every third latent."""

    n_asked = 0

    def explain(self, evidence: Evidence) -> str:
        self.n_asked += 1
        if self.n_asked % 3 == 0:
            raise Unreachable("busy")
        return super().explain(evidence)


def ran(judge: RuleJudge | None = None, **given: bool) -> Autointerp:
    autointerp = Autointerp(SETUP, judge)
    autointerp.update(text_batch(**given))
    return autointerp


def number(autointerp: Autointerp, name: str) -> float:
    value = autointerp.compute()[name]
    assert isinstance(value, float), value
    return value


def test_latents_that_are_words_are_explained() -> None:
    autointerp = ran()
    assert number(autointerp, "detection_auroc") > 0.98
    assert number(autointerp, "fuzzing_auroc") > 0.98
    words = {e.latent: e for e in autointerp.explanations()}
    assert words[3].text.startswith('token "w3"')
    assert words[3].by == "rules"


@pytest.mark.parametrize("score", ["detection_auroc", "fuzzing_auroc"])
def test_shuffled_latents_and_swapped_explanations_are_chance(score: str) -> None:
    shuffled = ran(shuffle=True)
    assert number(shuffled, f"{score}/low") <= 0.5 <= number(shuffled, f"{score}/high")
    honest = ran()
    low, high = (number(honest, f"{score}_swapped/{end}") for end in ("low", "high"))
    # Words exclude each other: another's is among wrong marks alone, so fuzzing falls short of 0.5.
    exclusion = 1 / D_SAE if score == "fuzzing_auroc" else 0.0
    assert low <= 0.5 <= high + exclusion


def test_dead_latents_count_as_nothing_and_are_said() -> None:
    autointerp = ran()
    share = number(autointerp, "judge_unscored")
    assert share == pytest.approx(2 / D_SAE)
    expected = number(autointerp, "detection_auroc") * (1 - share)
    assert number(autointerp, "detection_auroc_all") == pytest.approx(expected)
    scores = autointerp.arrays()["latents/detection_auroc"]
    assert scores.shape == (D_SAE,)
    assert int(scores.isnan().sum()) == 2


def test_nonsense_is_wrong() -> None:
    nonsense = ran(Nonsense())
    assert number(nonsense, "detection_auroc") == 0
    assert number(nonsense, "fuzzing_auroc") == 0
    assert number(nonsense, "judge_invalid") == 1
    assert number(ran(Talkative()), "judge_invalid") == 1
    assert number(ran(), "judge_invalid") == 0


def test_a_judge_out_of_reach_is_reported() -> None:
    away = ran(Away())
    assert number(away, "judge_unreached") == pytest.approx(1 - 2 / D_SAE)
    for name in ("detection_auroc", "detection_auroc_all"):
        value = away.compute()[name]
        assert isinstance(value, Undefined)
        assert "no route" in value.reason


def test_latents_that_could_not_be_asked_about_are_not_counted_as_wrong() -> None:
    partly = ran(OftenAway())
    assert number(partly, "judge_unreached") == pytest.approx(12 / D_SAE)
    assert number(partly, "detection_auroc") > 0.98
    expected = number(partly, "detection_auroc") * (1 - 2 / D_SAE)
    assert number(partly, "detection_auroc_all") == pytest.approx(expected)


def test_parts_in_any_order_give_the_same() -> None:
    batch = text_batch()
    whole = ran().compute()
    first, second = Autointerp(SETUP), Autointerp(SETUP)
    first.update(part_of(batch, slice(250, 400)))
    second.update(part_of(batch, slice(100, 250)))
    second.update(part_of(batch, slice(0, 100)))
    first.merge(second)
    assert first.compute() == whole
    assert first.seen.n_documents == 400


def test_without_text_nothing_is_said() -> None:
    autointerp = Autointerp(SETUP)
    autointerp.update(text_batch(lm=None))
    assert set(autointerp.compute()) == set(LABELS)
    assert all(isinstance(value, Undefined) for value in autointerp.compute().values())
    assert autointerp.explanations() == []


def test_explaining_and_asking_share_no_document() -> None:
    sampler = ran().sampler
    for windows in (sampler.sampled, sampler.strongest):
        halves = windows.groups % 2
        explained, asked = windows.documents[halves == 0], windows.documents[halves == 1]
        assert len(explained) > 0
        assert len(asked) > 0
        assert not torch.isin(explained, asked).any()
    pool = sampler.pool
    shown = pool.documents[pool.groups == 0]
    assert not torch.isin(shown, pool.documents[pool.groups == 1]).any()


def test_texts_in_which_a_latent_is_silent_are_silent() -> None:
    sampler = ran().sampler
    words = sampler.pool.tokens
    for latent in (0, 5, 30):
        has_word = (words == latent).any(1)
        assert (sampler.pool.fires[:, latent] <= has_word).all()
        assert not (has_word & ~sampler.pool.fires[:, latent])[~_starts(words)].any()


def _starts(words: torch.Tensor) -> torch.Tensor:
    """Mark texts that hold their document's first token, which is masked and fires for nothing."""
    return (words[:, :20] == -1).any(1) | (words[:, 0] >= 0)


def test_settings_change_what_is_asked() -> None:
    few = dataclasses.replace(SETTINGS, judge_latents=5)
    autointerp = Autointerp(dataclasses.replace(SETUP, settings=few))
    assert len(autointerp.sampler.latents) == 5
    more = dataclasses.replace(SETTINGS, judge_examples=6)
    asked = Autointerp(dataclasses.replace(SETUP, settings=more))
    asked.update(text_batch())
    assert asked.sampler.sampled.groups.bincount().max() == 6
    with pytest.raises(ValueError, match="judge_examples"):
        EvalConfig(judge_examples=3)
    with pytest.raises(ValueError, match="judge_latents"):
        EvalConfig(judge_latents=0)


def test_every_seed_halves_documents_in_its_own_way() -> None:
    batch = text_batch()
    slots = torch.arange(D_SAE)
    halves = [_View(batch, slots, seed).halves for seed in (0, 1, 2, 2**31 - 1)]
    for i, half in enumerate(halves):
        assert 0.3 < half.double().mean() < 0.7
        assert all((half != other).any() for other in halves[:i])
