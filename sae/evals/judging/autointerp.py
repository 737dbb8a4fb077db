"""Can a judge say what latents mean? Explanations, and how well they tell where a latent fires.

`eval.judge_latents` latents, drawn uniformly from all d_sae, are explained from texts of one half
of the documents; the explanation then answers questions about texts of the other (`questions`).
    detection_auroc  does the explanation tell texts in which the latent fires from others
    fuzzing_auroc    does it tell the tokens on which it fires from others in the same texts
Both are means over the latents that could be asked about; `_all` are means over all that were
drawn, in which a latent that is dead, or fires in too few documents to be tested, counts as 0.
`_swapped` are the nulls: each latent scored with the explanation of another one, 0.5 but for what
latents have in common. (Of fuzzing a little less, by half the rate of another latent's words, where
latents exclude each other: those words are then only among the tokens that are marked wrongly.)
judge_unscored, judge_unreached: shares of the latents drawn; judge_invalid: share of the answers
that were none, which count as wrong.
Intervals are over the latents drawn, not over documents: which latents were drawn matters more.

Source: Paulo et al. 2024 (arXiv 2410.13928); deviations: AUROC in place of accuracy, disjoint
documents, hard negatives, latents uniformly over all, dead ones too.
Cost: one pass for the texts, memory by the latents drawn; then three requests a latent and two for
its null. Cannot see: a broken decoder; latents that fire rightly on only some of their texts
(recall); whether an explanation says the cause or what goes along with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sae.evals.bootstrap import with_intervals
from sae.evals.interface import ContextBatch, EvalSetup, Explanation, Label, Seen, Undefined, Value
from sae.evals.judging.asking import Answers, Verdict, ask
from sae.evals.judging.judge import Judge
from sae.evals.judging.judges import make_judge
from sae.evals.judging.questions import Examiner
from sae.evals.judging.sampling import Sampler

POOL_TEXTS = 2048
NO_TEXT = "the activations come from no language model, so there is no text to judge"
NO_ANSWER = "no latent that was drawn could be asked about"
SCORES = ("detection", "fuzzing")

LABELS = {
    "detection_auroc": Label(
        "texts that fire told by the explanation, AUROC", better="higher", best=1
    ),
    "detection_auroc_all": Label("the same, untestable latents 0", better="higher", best=1),
    "detection_auroc_swapped": Label("the same by another latent's explanation"),
    "fuzzing_auroc": Label(
        "tokens that fire told by the explanation, AUROC", better="higher", best=1
    ),
    "fuzzing_auroc_all": Label("the same, untestable latents 0", better="higher", best=1),
    "fuzzing_auroc_swapped": Label("the same by another latent's explanation"),
    "judge_unscored": Label("latents drawn that fire too rarely to test", "share", better="lower"),
    "judge_unreached": Label("latents drawn for which the judge was out of reach", "share"),
    "judge_invalid": Label("the judge's answers that were none", "share"),
}
LATENT_LABELS = {
    "detection_auroc": Label("explanation: texts, AUROC"),
    "fuzzing_auroc": Label("explanation: tokens, AUROC"),
}
CANNOT_SEE = ("a broken decoder", "low recall", "what the judge cannot read")


class Autointerp:
    """Accumulates what `LABELS` lists; the judge is asked at the end, once.

    Args:
        judge: None: the one that `setup.settings` names.
    """

    def __init__(self, setup: EvalSetup, judge: Judge | None = None) -> None:
        settings = setup.settings
        self.setup, self.seen = setup, Seen()
        self.judge = make_judge(settings) if judge is None else judge
        n = settings.judge_examples
        latents = _drawn(setup.d_sae, settings.judge_latents, setup.seed)
        self.sampler = Sampler(latents, setup.d_sae, setup.seed, n, n, POOL_TEXTS)
        self._tokenizer: object | None = None
        self._outcome: Answers | None = None

    def update(self, batch: ContextBatch) -> None:
        """Add a batch of contexts; those without text are only counted."""
        self.seen.update(batch.contexts.document_ids.flatten()[batch.kept.cpu()])
        if batch.lm is not None:
            self._tokenizer, self._outcome = batch.lm.tokenizer, None
            self.sampler.update(batch)

    def merge(self, other: Autointerp) -> None:
        """Add the texts that `other` saw."""
        self.seen.merge(other.seen)
        self.sampler.merge(other.sampler)
        self._tokenizer, self._outcome = self._tokenizer or other._tokenizer, None

    def compute(self) -> dict[str, Value]:
        """Return every metric of this module."""
        if self._tokenizer is None:
            return dict.fromkeys(LABELS, Undefined(NO_TEXT))
        answers = self._answers()
        n = len(self.sampler.latents)
        metrics = with_intervals(
            self._means,
            torch.ones(n, dtype=torch.bool),
            seed=self.setup.seed,
            n_resamples=self.setup.n_resamples,
            reasons=dict.fromkeys(LABELS, self._no_answer()),
            can_pair=False,
        )
        verdicts = [*answers.verdicts.values(), *answers.swapped.values()]
        n_answers = sum(verdict.n_answers for verdict in verdicts)
        n_asked = len(set(answers.verdicts) | set(answers.unreached))
        invalid = sum(verdict.n_invalid for verdict in verdicts)
        return {
            **metrics,
            "judge_unscored": 1 - n_asked / n,
            "judge_unreached": len(answers.unreached) / n,
            "judge_invalid": invalid / n_answers if n_answers else Undefined(self._no_answer()),
        }

    def arrays(self) -> dict[str, Tensor]:
        """Return both scores by latent, NaN for latents without."""
        if self._tokenizer is None:
            return {}
        answers, scores = self._answers(), {}
        for score in SCORES:
            values = torch.full((self.setup.d_sae,), torch.nan)
            own = _column(answers.verdicts, score, len(self.sampler.latents))
            values[self.sampler.latents] = own.float()
            scores[f"latents/{score}_auroc"] = values
        return scores

    def explanations(self) -> list[Explanation]:
        """Return what the judge said of each latent it was asked about."""
        if self._tokenizer is None:
            return []
        said = self._answers().explanations
        latents = self.sampler.latents.tolist()
        return [Explanation(latents[slot], text, self.judge.name) for slot, text in said.items()]

    def _answers(self) -> Answers:
        """Ask the judge, once for what was seen so far."""
        if self._outcome is None:
            examiner = Examiner(self.sampler, self._tokenizer, self.setup.settings.judge_examples)
            slots = range(len(self.sampler.latents))
            asked = {slot: examiner.questions(slot) for slot in slots}
            given = {slot: what for slot, what in asked.items() if what is not None}
            self._outcome = ask(self.judge, given)
        return self._outcome

    def _means(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the mean scores for weights of the latents drawn, (r, n): (r) each.

        `_all` is the mean over those reached times the share that could be asked about: a judge out
        of reach says nothing about its latents, while the untestable ones are 0.
        """
        answers, n = self._answers(), len(self.sampler.latents)
        is_testable = torch.zeros(n, dtype=torch.float64)
        is_testable[[*answers.verdicts, *answers.unreached]] = 1
        share = weights @ is_testable / weights.sum(1)
        found = {}
        for score in SCORES:
            own = _mean(weights, _column(answers.verdicts, score, n))
            found[f"{score}_auroc"] = own
            found[f"{score}_auroc_all"] = (share * own).where(share > 0, 0.0)
            swapped = _column(answers.swapped, score, n)
            found[f"{score}_auroc_swapped"] = _mean(weights, swapped)
        return found

    def _no_answer(self) -> str:
        reasons = list(self._answers().unreached.values())
        return f"the judge was out of reach: {reasons[0]}" if reasons else NO_ANSWER


def _drawn(d_sae: int, n: int, seed: int) -> Tensor:
    """Return up to `n` latents drawn without repeats, in order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(d_sae, generator=generator)[:n].sort().values


def _column(verdicts: Mapping[int, Verdict], score: str, n: int) -> Tensor:
    values = [getattr(verdicts[slot], score) if slot in verdicts else math.nan for slot in range(n)]
    return torch.tensor(values, dtype=torch.float64)


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    """Return the weighted means over the latents that have a value, (r)."""
    has = torch.isfinite(values).double()
    return (weights @ values.nan_to_num(0.0)) / (weights @ has)
