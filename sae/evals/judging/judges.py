"""The judges by name. To add one: its file, a row here, its name in `config.JudgeName`."""

from __future__ import annotations

from collections.abc import Callable

from sae.config import EvalConfig, JudgeName
from sae.evals.judging.endpoint import EndpointJudge
from sae.evals.judging.judge import Judge
from sae.evals.judging.local_model import LocalModelJudge
from sae.evals.judging.rules import RuleJudge
from sae.evals.judging.similarity import similarity_judge

JUDGES: dict[JudgeName, Callable[[EvalConfig], Judge]] = {
    "rules": lambda _: RuleJudge(),
    "similarity": similarity_judge,
    "endpoint": EndpointJudge,
    "local_model": LocalModelJudge,
}


def make_judge(settings: EvalConfig) -> Judge:
    """Return the judge that `eval.judge` names."""
    return JUDGES[settings.judge](settings)
