"""A judge behind any endpoint that speaks OpenAI's chat protocol: POST {url}/chat/completions.

Requests are made at temperature 0 with a timeout. Those that fail for a reason that may pass (no
connection, a timeout, status 429 or 5xx) are tried again, `eval.judge_tries` times in all, after
`eval.judge_pause_seconds`, then twice that, and so on, or after what Retry-After says; at most
`eval.judge_requests_per_minute` begin in a minute. Then the latent is out of reach, and the eval
says so. Answers are kept in `eval.judge_cache`, one file each by a hash of what was asked, so that
a run that was cut off goes on and the same questions are never paid twice.

The key is read from the environment variable that `eval.judge_key` names; it is never printed or
written. What it costs: before the first request of a kind the log says about how many tokens all of
them will take, a token for every four characters.
What is asked, and how answers are read: `prompts`.
Cannot see: whether the endpoint's model changed under its name; a cached answer stays.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from sae.config import EvalConfig
from sae.evals.judging.judge import Confidence, Evidence, Example, Unreachable
from sae.evals.judging.prompts import (
    ask_to_explain,
    ask_to_score,
    parse_scores,
    read_explanation,
)
from sae.files import write_json

LOG = logging.getLogger("sae.evals")
CHARACTERS_PER_TOKEN = 4
LONGEST_PAUSE_SECONDS = 60.0
NO_ANSWER = (ValueError, KeyError, IndexError, TypeError)
"""What reading a reply raises that is not of the protocol."""
MAY_PASS = (408, 409, 425, 429)


class EndpointJudge:
    """The judge of this module.

    Errors: ValueError where the endpoint, its model or its key is missing, before any request.
    """

    def __init__(self, settings: EvalConfig) -> None:
        for name in ("judge_url", "judge_model"):
            if not getattr(settings, name):
                raise ValueError(
                    f"`eval.{name}` must be given for the judge endpoint; got None. Give, for "
                    "example, --eval.judge_url http://localhost:8000/v1 --eval.judge_model NAME."
                )
        if not str(settings.judge_url).startswith(("http://", "https://")):
            raise ValueError(
                "`eval.judge_url` must begin with http:// or https://; got "
                f"{settings.judge_url!r}. Give the address that ends before /chat/completions."
            )
        self.settings = settings
        self.name = f"{settings.judge_model} at {settings.judge_url}"
        self.n_at_once = 4
        self._key = _key(settings)
        self._lock, self._next_start = threading.Lock(), 0.0

    def explain(self, evidence: Evidence) -> str:
        """Return one sentence on what the firing tokens have in common."""
        return read_explanation(self._ask(ask_to_explain(evidence)))

    def score(self, explanation: str, examples: Sequence[Example]) -> list[Confidence]:
        """Return numbers from 0 to 10; None for all where the answer is no list of as many."""
        return parse_scores(self._ask(ask_to_score(explanation, examples)), len(examples))

    def announce(self, n_latents: int) -> None:
        """Log about what asking for `n_latents` latents will take."""
        n_texts = self.settings.judge_examples
        characters = n_texts * 32 * CHARACTERS_PER_TOKEN
        tokens = n_latents * (characters + 4 * 2 * characters) // CHARACTERS_PER_TOKEN
        LOG.info(
            "Judging %d latents takes about %d requests and %s tokens of %s, less what "
            "is cached in %s.",
            n_latents,
            5 * n_latents,
            f"{float(f'{tokens:.2g}'):,.0f}",
            self.name,
            self.settings.judge_cache,
        )

    def _ask(self, content: str) -> str:
        """Return the answer, from the cache where it is there."""
        asked = json.dumps([self.settings.judge_url, self.settings.judge_model, content])
        digest = hashlib.sha256(asked.encode()).hexdigest()
        path = Path(self.settings.judge_cache).expanduser() / f"{digest}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["answer"]
        answer = self._tried(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"model": self.settings.judge_model, "answer": answer})
        return answer

    def _tried(self, content: str) -> str:
        """Return the endpoint's answer after as many tries as are allowed."""
        tries, reason = self.settings.judge_tries, ""
        for number in range(tries):
            pause = self.settings.judge_pause_seconds * 2.0**number
            self._wait_for_turn()
            try:
                return self._request(content)
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code not in MAY_PASS and error.code < 500:
                    break
                pause = _seconds(error.headers.get("Retry-After"), pause)
            except (OSError, http.client.HTTPException, *NO_ANSWER) as error:
                reason = str(error) or type(error).__name__
            if number + 1 < tries:
                time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        raise Unreachable(f"{self.settings.judge_url} gave no answer: {reason}")

    def _request(self, content: str) -> str:
        body = {
            "model": self.settings.judge_model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        request = urllib.request.Request(
            f"{str(self.settings.judge_url).rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"} | self._headers(),
        )
        timeout = self.settings.judge_timeout_seconds
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return str(json.loads(reply.read())["choices"][0]["message"]["content"])

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _wait_for_turn(self) -> None:
        """Begin no more requests than are allowed in a minute."""
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + 60.0 / self.settings.judge_requests_per_minute
        time.sleep(max(start - time.monotonic(), 0.0))


def _key(settings: EvalConfig) -> str:
    if settings.judge_key is None:
        return ""
    key = os.environ.get(settings.judge_key, "")
    if not key:
        raise ValueError(
            "`eval.judge_key` must name an environment variable that holds the endpoint's key; "
            f"{settings.judge_key} is not set. Set it, or leave `eval.judge_key` out."
        )
    return key


def _seconds(text: str | None, otherwise: float) -> float:
    return float(text) if text and text.isdigit() else otherwise
