"""The judge behind an endpoint, against a server of our own in a thread."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chat_answers import word_reader
from judging_texts import SETTINGS, SETUP, text_batch

from sae.config import EvalConfig
from sae.evals.judging.autointerp import Autointerp
from sae.evals.judging.endpoint import EndpointJudge
from sae.evals.judging.judge import Evidence, Example, Unreachable
from sae.evals.judging.prompts import parse_scores

Reply = tuple[int, str]
TEXTS = [Example((" a", " dog")), Example((" a", " cat"))]


class Server:
    """Answers each chat request with `answer(body, headers)`: a status and a text."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.started: list[float] = []
        self.answer: Callable[[str], Reply] = lambda _: (200, "[10, 0]")
        self.retry_after: str | None = None
        self.raw: bytes | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.started.append(time.monotonic())
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                status, text = server.answer(body["messages"][0]["content"])
                message = {"choices": [{"message": {"content": text}}]}
                reply = json.dumps(message).encode() if server.raw is None else server.raw
                self.send_response(status)
                if server.retry_after:
                    self.send_header("Retry-After", server.retry_after)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> EvalConfig:
    return replace(
        SETTINGS,
        judge="endpoint",
        judge_url=server.url,
        judge_model="wise",
        judge_cache=str(tmp_path / "cache"),
        judge_pause_seconds=0.01,
        judge_timeout_seconds=5.0,
        judge_requests_per_minute=1e6,
        judge_tries=3,
    )


def test_it_asks_and_reads_the_answer(server: Server, settings: EvalConfig) -> None:
    judge = EndpointJudge(settings)
    assert judge.score("dogs", TEXTS) == [10, 0]
    (body,) = server.bodies
    assert body["model"] == "wise"
    assert '2. " a cat"' in body["messages"][0]["content"]
    server.answer = lambda _: (200, " pets \n at home")
    said = judge.explain(Evidence((Example((" a", " dog"), (0.0, 1.0)),), ()))
    assert said == "pets at home"
    assert '1. " a« dog»"' in server.bodies[1]["messages"][0]["content"]


def test_answers_are_kept_and_nothing_is_asked_twice(server: Server, settings: EvalConfig) -> None:
    EndpointJudge(settings).score("dogs", TEXTS)
    assert EndpointJudge(settings).score("dogs", TEXTS) == [10, 0]
    assert len(server.bodies) == 1
    EndpointJudge(replace(settings, judge_model="wiser")).score("dogs", TEXTS)
    assert len(server.bodies) == 2


@pytest.mark.parametrize("status", [429, 503])
def test_what_may_pass_is_tried_again(server: Server, settings: EvalConfig, status: int) -> None:
    server.answer = lambda _: (status, "") if len(server.bodies) < 3 else (200, "[1, 2]")
    assert EndpointJudge(settings).score("dogs", TEXTS) == [1, 2]
    assert len(server.bodies) == 3


def test_after_all_tries_it_is_out_of_reach(server: Server, settings: EvalConfig) -> None:
    server.answer = lambda _: (503, "")
    with pytest.raises(Unreachable, match="status 503"):
        EndpointJudge(settings).score("dogs", TEXTS)
    assert len(server.bodies) == 3
    assert not list(Path(settings.judge_cache).glob("*"))


def test_what_will_not_pass_is_not_tried_again(server: Server, settings: EvalConfig) -> None:
    server.answer = lambda _: (401, "")
    with pytest.raises(Unreachable, match="status 401"):
        EndpointJudge(settings).score("dogs", TEXTS)
    assert len(server.bodies) == 1


def test_a_slow_answer_times_out(server: Server, settings: EvalConfig) -> None:
    def sleepy(_: str) -> Reply:
        time.sleep(0.5)
        return 200, "[1, 2]"

    server.answer = sleepy
    hasty = replace(settings, judge_timeout_seconds=0.05, judge_tries=1)
    with pytest.raises(Unreachable, match="timed out"):
        EndpointJudge(hasty).score("dogs", TEXTS)


def test_pauses_follow_the_settings_and_the_server(server: Server, settings: EvalConfig) -> None:
    server.answer = lambda _: (503, "")
    with pytest.raises(Unreachable):
        EndpointJudge(replace(settings, judge_pause_seconds=0.2)).score("dogs", TEXTS)
    first, second, third = server.started
    assert second - first >= 0.2
    assert third - second >= 0.4
    server.retry_after = "1"
    with pytest.raises(Unreachable):
        EndpointJudge(replace(settings, judge_tries=2)).score("dogs", TEXTS)
    assert server.started[-1] - server.started[-2] >= 1


def test_no_more_requests_begin_than_allowed(server: Server, settings: EvalConfig) -> None:
    judge = EndpointJudge(replace(settings, judge_requests_per_minute=600))
    for word in ("dogs", "cats", "mice"):
        judge.score(word, TEXTS)
    # What the server sees is later by what its threads wait, most where the first waits longest.
    assert server.started[2] - server.started[0] >= 0.15


def test_the_key_is_sent_and_a_missing_one_named(
    server: Server, settings: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = replace(settings, judge_key="A_JUDGES_KEY")
    monkeypatch.delenv("A_JUDGES_KEY", raising=False)
    with pytest.raises(ValueError, match="A_JUDGES_KEY is not set"):
        EndpointJudge(asks)
    monkeypatch.setenv("A_JUDGES_KEY", "secret")
    judge = EndpointJudge(asks)
    judge.score("dogs", TEXTS)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    kept = "".join(path.read_text() for path in Path(settings.judge_cache).iterdir())
    assert "secret" not in kept + judge.name


@pytest.mark.parametrize("wrong", [{"judge_url": None}, {"judge_model": None}])
def test_what_is_missing_is_said_first(settings: EvalConfig, wrong: dict[str, None]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EndpointJudge(replace(settings, **wrong))


def test_only_web_addresses_are_asked(settings: EvalConfig) -> None:
    with pytest.raises(ValueError, match="http://"):
        EndpointJudge(replace(settings, judge_url="file:///etc"))


@pytest.mark.parametrize("answer", ["dunno", "[1]", "[1, 2, 3]", '["a", "b"]', "[true, false]"])
def test_nonsense_is_no_answer(answer: str) -> None:
    assert parse_scores(answer, 2) == [None, None]
    assert parse_scores("Sure: [1, 2]", 2) == [1, 2]


def test_autointerp_asks_it_and_says_the_cost_first(
    server: Server, settings: EvalConfig, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = lambda content: (200, word_reader(content))
    few = replace(settings, judge_latents=6)
    autointerp = Autointerp(replace(SETUP, settings=few))
    autointerp.update(text_batch())
    with caplog.at_level(logging.INFO):
        metrics = autointerp.compute()
    assert re.search(r"about \d+ requests and [1-9][\d,]* tokens", caplog.text)
    score = metrics["detection_auroc"]
    assert isinstance(score, float)
    assert score > 0.8
    n_asked = len(server.bodies)
    again = Autointerp(replace(SETUP, settings=few))
    again.update(text_batch())
    assert again.compute() == metrics
    assert len(server.bodies) == n_asked


def test_shuffled_latents_and_swapped_explanations_are_chance(
    server: Server, settings: EvalConfig
) -> None:
    server.answer = lambda content: (200, word_reader(content))
    found = []
    for shuffle in (False, True):
        few = replace(settings, judge_latents=16)
        autointerp = Autointerp(replace(SETUP, settings=few))
        autointerp.update(text_batch(shuffle=shuffle))
        found.append(autointerp.compute())
    honest, shuffled = found
    low, high = (honest[f"detection_auroc_swapped/{end}"] for end in ("low", "high"))
    assert low <= 0.5 <= high  # type: ignore[operator]
    for name in ("detection_auroc", "fuzzing_auroc"):
        low, high = (shuffled[f"{name}/{end}"] for end in ("low", "high"))
        assert low <= 0.5 <= high, name  # type: ignore[operator]


def test_an_endpoint_that_is_away_or_answers_nonsense_is_reported(
    server: Server, settings: EvalConfig
) -> None:
    few = replace(settings, judge_latents=10, judge_tries=1)

    def asked() -> dict:
        autointerp = Autointerp(replace(SETUP, settings=few))
        autointerp.update(text_batch())
        return dict(autointerp.compute())

    server.answer = lambda _: (200, "I would rather not say.")
    nonsense = asked()
    assert nonsense["judge_invalid"] == 1
    assert nonsense["detection_auroc"] == 0
    server.answer = lambda _: (500, "")
    few = replace(few, judge_cache=f"{few.judge_cache}_other")
    away = asked()
    assert away["judge_unreached"] == pytest.approx(1 - away["judge_unscored"])
    assert "status 500" in away["detection_auroc"].reason


def test_nobody_there_is_out_of_reach(settings: EvalConfig) -> None:
    nobody = replace(settings, judge_url="http://127.0.0.1:9/v1", judge_tries=2)
    with pytest.raises(Unreachable, match="gave no answer"):
        EndpointJudge(nobody).score("dogs", TEXTS)


@pytest.mark.parametrize("reply", [b"not json", b"{}", b'{"choices": []}'])
def test_a_reply_that_is_not_of_the_protocol_is_no_answer(
    server: Server, settings: EvalConfig, reply: bytes
) -> None:
    server.raw = reply
    with pytest.raises(Unreachable, match="gave no answer"):
        EndpointJudge(settings).score("dogs", TEXTS)
    assert len(server.bodies) == 3
