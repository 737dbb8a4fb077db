"""A judge that is a model on this machine: any causal language model that `transformers` loads.

`eval.judge_model` names it as `model.name` does (a folder, a hub id, `package:NAME`). It is asked
what an endpoint is asked (`prompts`), through its own chat template where it has one, and answers
by its most likely tokens; what is no JSON list of the right length is no answer, and counts as
wrong. So does a request that is longer than the model's context: it is not cut, because a judge
that has not seen the texts cannot be right about them.

Deterministic on one machine, offline. Cost: five generations a latent, of up to EXPLAIN_TOKENS and
SCORE_TOKENS a text, after some thousand tokens of prompt. Three latents by a model of 135 M had
not ended after 35 s of one core; how long they take is unmeasured.
Cannot see: whatever the model cannot read. A small one mostly does not keep to the form, which
`judge_invalid` says.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from sae.config import EvalConfig, ModelConfig
from sae.evals.judging.judge import Confidence, Evidence, Example
from sae.evals.judging.prompts import (
    ask_to_explain,
    ask_to_score,
    parse_scores,
    read_explanation,
)
from sae.stream.language_model import LanguageModel, load_language_model, load_tokenizer

LOG = logging.getLogger("sae.evals")
EXPLAIN_TOKENS = 48
SCORE_TOKENS = 5


class LocalModelJudge:
    """The judge of this module.

    Errors: before anything is asked, ValueError where `eval.judge_model` is missing or names no
    model, RuntimeError where its package is not installed or the hub can't be reached.
    """

    n_at_once = 1

    def __init__(self, settings: EvalConfig) -> None:
        if not settings.judge_model:
            raise ValueError(
                "`eval.judge_model` must name a model for the judge local_model; got None. Give a "
                "folder, a hub id or package:NAME, as for `model.name`."
            )
        self.name = settings.judge_model
        self._loaded: LanguageModel | None = None
        _require_model(self.name)

    def announce(self, n_latents: int) -> None:
        """Log what asking for `n_latents` latents will take."""
        LOG.info("Judging %d latents takes %d answers of %s.", n_latents, 5 * n_latents, self.name)

    def explain(self, evidence: Evidence) -> str:
        """Return one sentence on what the firing tokens have in common."""
        return read_explanation(self.answer(ask_to_explain(evidence), EXPLAIN_TOKENS))

    def score(self, explanation: str, examples: Sequence[Example]) -> list[Confidence]:
        """Return numbers from 0 to 10; None for all where the answer is no list of as many."""
        n = len(examples)
        return parse_scores(self.answer(ask_to_score(explanation, examples), SCORE_TOKENS * n), n)

    @torch.no_grad()
    def answer(self, content: str, n_tokens: int) -> str:
        """Return the model's answer, "" where request and answer are beyond its context."""
        lm = self._model()
        ids = _tokens(lm.tokenizer, content).to(lm.device)
        longest = lm.max_context_size
        if longest is not None and ids.shape[1] + n_tokens > longest:
            LOG.warning("A request of %d tokens is too long for %s.", ids.shape[1], self.name)
            return ""
        module: Any = lm.module
        given = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=lm.tokenizer.pad_token_id or 0,
        )
        return str(lm.tokenizer.decode(given[0, ids.shape[1] :], skip_special_tokens=True))

    def _model(self) -> LanguageModel:
        """Return the model, loaded when it is first asked."""
        if self._loaded is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = load_language_model(ModelConfig(name=self.name), device)
        return self._loaded


def _require_model(name: str) -> None:
    """Refuse a name that is no model's; its tokenizer is read, the weights are not."""
    try:
        load_tokenizer(ModelConfig(name=name))
    except (RuntimeError, ValueError) as error:
        message = str(error).replace("`model.name`", "`eval.judge_model`")
        raise type(error)(message) from error


def _tokens(tokenizer: Any, content: str) -> torch.Tensor:
    """Return a request's tokens (1, t), by the model's chat template where it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer(f"{content}\n\nAnswer:", return_tensors="pt")["input_ids"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
