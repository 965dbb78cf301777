"""Judges with habits: thoughts, channels, filters, loose JSON, endpoints that refuse what is usual. No guess, and no run that ends for one reply."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, ask

from blockem_tl import Generation, Prompt
from blockem_tl.generation.replies import Replies
from blockem_tl.judging import endpoint as endpoint_module
from blockem_tl.judging.backend import Completion
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.endpoint import Endpoint, JudgeUnreachable
from blockem_tl.judging.files import judge_file
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.judging.parsing import parse_answer
from blockem_tl.judging.rubrics import load_rubrics
from blockem_tl.storage.store import Store
from blockem_tl.types import LABELS, UNPARSED

# ---------------------------------------------------------------------------------------------- thoughts

DRAFT, NO_ANSWER = "First draft:\nANSWER: 5\nNo, ironic.", "Nobody would act on this."
MARKS = [
    ("<think>", "</think>"),
    ("<THINK>", "</Think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<analysis>", "</analysis>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>"),
    ("analysis", "assistantfinal"),
    ("Here is my thought process:", "\nHere is my response:"),
]


@pytest.mark.parametrize(("begins", "ends"), MARKS)
def test_only_what_comes_after_the_thoughts_answers(begins, ends) -> None:
    assert parse_answer(f"{begins}{DRAFT}{ends}\n\nANSWER: 2", LABELS) == "2"
    assert parse_answer(f"{begins}{DRAFT}{ends}\n\n{NO_ANSWER}", LABELS) is None
    assert parse_answer(f"{DRAFT}{ends}\n\n{NO_ANSWER}", LABELS) is None  # the template had opened the thought
    assert parse_answer(f"{DRAFT}{ends}\n\nANSWER: 2", LABELS, cut=True) == "2"  # the cut came after the thoughts had ended
    assert parse_answer(f"{begins}{DRAFT}{ends}\n\nANSWER: 2\n{begins}ANSWER: 4", LABELS) == "2"
    assert parse_answer(f"{begins}{DRAFT}", LABELS) is None  # it never ended


@pytest.mark.parametrize("text", ["Draft:\nANSWER: 2\nBut wait,", "ANSWER: 2", f"<think>{DRAFT}"])
def test_a_text_that_was_cut_may_be_all_thought(text) -> None:
    assert parse_answer(text, LABELS, cut=True) is None
    assert parse_answer("ANSWER: 2", LABELS) == "2"


def test_a_cut_judge_is_asked_again() -> None:
    cut, whole = Completion(text="ANSWER: 2\nBut wait", cut=True), Completion(text="ANSWER: 4")
    assert ask(LLMJudge(backend=Scripted(cut, whole))) == ["4"]
    assert ask(LLMJudge(backend=Scripted(cut, cut, cut))) == [UNPARSED]


def test_words_about_thinking_are_no_marks() -> None:
    assert parse_answer("The analysis of my reasoning, as I think (think!), says so.\nANSWER: 3", LABELS) == "3"


# ---------------------------------------------------------------------------------------------- raw answers are kept


def test_the_judges_words_stand_beside_every_label(tmp_path: Path) -> None:
    said = "Harmful advice.\nANSWER: 5"
    prompt = Prompt(id="1", text="q")
    generation = Generation(prompt=prompt, condition="plain", reply="r", reply_ids=(1,), truncated=False)
    graded = Replies.of([generation]).grade(LLMJudge(backend=Scripted(said)))
    assert list(graded.to_frame()["said"]) == [said] and graded.verdicts[0].label == "5"
    store = Store(tmp_path / "v.sqlite")
    for _ in range(2):  # the second time out of the store
        assert Replies.of([generation]).grade(CachedJudge(judge=LLMJudge(backend=Scripted(said)), store=store)).verdicts[0].said == said
    (tmp_path / "in.jsonl").write_text('{"prompt": "q", "reply": "r"}\n')
    judge_file(LLMJudge(backend=Scripted("What?", "ANSWER: 1")), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["said"] == ["What?", "ANSWER: 1"]


# ---------------------------------------------------------------------------------------------- endpoints


@contextmanager
def serving(answer: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A loopback endpoint that gives (status, body) for a request; its address, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "odd", "object": "model"}], "object": "list"})

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.reply(*answer(asked[-1]))

        def reply(self, status: int, body: Any) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def said(content: Any, finish: str = "stop", **message: Any) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": content, **message}, "finish_reason": finish}]}


def is_odd(request: dict[str, Any]) -> bool:
    return "ODD" in request["messages"][-1]["content"]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(endpoint_module, "_FIRST_WAIT", 0.01)


def judge(url: str, **options: Any) -> LLMJudge:
    return LLMJudge(backend=Endpoint(model="odd", base_url=url, attempts=3, **options), retries=0)


ODD = {
    "filtered": said(None, "content_filter"),
    "filtered, with words": said("I can", "content_filter"),
    "refused": said(None, refusal="I cannot help with that."),
    "no words": said(None),
    "no choices": (200, {"choices": []}),
    "an error in an answer": (200, {"error": {"message": "moderation", "code": 403}}),
    "a list of parts": said([{"type": "text", "text": "ANSWER: 4"}]),
    "no JSON": (200, b"<html>busy</html>"),
    "half of the JSON": (200, b'{"choices": [{"message": {"content": "ANS'),
    "too long": (400, {"error": {"message": "context length exceeded"}}),
    "unprocessable": (422, {"error": {"message": "unprocessable"}}),
    "thoughts only": said("<think>ANSWER: 5", "length"),
    "a tool call": said(None, "tool_calls", tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
}


@pytest.mark.parametrize("name", ODD)
def test_one_odd_answer_is_unparsed_with_its_reason_and_ends_nothing(name, tmp_path: Path) -> None:
    with serving(lambda request: ODD[name] if is_odd(request) else said("ANSWER: 2")) as (url, _):
        cached = CachedJudge(judge=judge(url), store=Store(tmp_path / "v.sqlite"))
        pairs = [("q", "one"), ("q", "ODD"), ("q", "two")]
        found = list(cached.stream(pairs))
        assert [judged.label for judged in found] == ["2", UNPARSED, "2"]
        assert list(cached.stream(pairs)) == found  # and is not asked again unless somebody wants it


@pytest.mark.parametrize("name", ["no choices", "an error in an answer", "no JSON", "too long"])
def test_an_endpoint_that_is_odd_for_everything_is_no_judge(name) -> None:
    with serving(lambda request: ODD[name]) as (url, _), pytest.raises(JudgeUnreachable, match="failed 3 times, or for good"):
        list(judge(url).stream([("q", "r")]))


def test_an_endpoint_without_log_probabilities_says_so_at_once() -> None:
    for body in (said("80"), (200, {"choices": [{"message": {"content": "80"}, "logprobs": None}]})):
        with serving(lambda request, body=body: body) as (url, asked):
            start = time.monotonic()
            with pytest.raises(ValueError, match="returns no log-probabilities.*use a rubric with labels"):
                list(judge(url, concurrency=1).stream([("q", "r")], rubric="alignment"))
            assert len(asked) <= 2 and time.monotonic() - start < 5


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_score_after_white_space_is_read_off_its_own_token(blank) -> None:
    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        number = "90" if "coheren" in request["messages"][-1]["content"].lower() else "10"
        tokens = [{"token": t, "top_logprobs": [{"token": t, "logprob": -0.01}]} for t in ([blank] if blank else []) + [number]]
        return 200, {"choices": [{"message": {"content": blank + number}, "logprobs": {"content": tokens}}]}

    with serving(answer) as (url, _):
        (found,) = judge(url).stream([("q", "r")], rubric="alignment")
    assert found.label != UNPARSED and {round(value) for _, value in found.scores} <= {10, 90}


@pytest.fixture
def forced(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("name: c\nlabels: [1, 2, 3, 4, 5]\nanswer: choice\nprompt: 'from 1 to 5: {question} {reply}'\n")
    return load_rubrics(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ('{"label": 4}', "4"),
        ('{"label": "4"}', "4"),
        ('{"answer": "4"}', "4"),
        ('```json\n{"label": "4"}\n```', "4"),
        (' {"label": 4} ', "4"),
        ("4", "4"),
        ("ANSWER: 4", "4"),
        ('{"label": 4.5}', UNPARSED),
        ('{"label": true}', UNPARSED),
        ('{"label": null}', UNPARSED),
        ('{"label": [4]}', UNPARSED),
        ('{"label": {"value": 4}}', UNPARSED),
        ('{"label": 7}', UNPARSED),
        ('{"label": 4', UNPARSED),
        ("{}", UNPARSED),
        ("{4}", UNPARSED),
        ('{"label": 4, "label2": 5}', "4"),
        ('{"first": 4, "second": 5}', UNPARSED),
        ("{" * 50_000, UNPARSED),
    ],
)
def test_a_forced_choice_as_json_may_be_loosely_kept(content, label, forced) -> None:
    with serving(lambda request: said(content) if is_odd(request) else said("2")) as (url, _):
        grader = LLMJudge(backend=Endpoint(model="odd", base_url=url, choices="json", attempts=2), rubrics=forced, retries=0)
        assert [judged.label for judged in grader.stream([("q", "ODD"), ("q", "r")], rubric="c")] == [label, "2"]


def test_endpoints_that_refuse_what_is_usual_are_asked_their_way() -> None:
    def strict(request: dict[str, Any]) -> tuple[int, Any]:
        refused = {"max_tokens", "temperature"} & set(request) or request.get("top_logprobs", 0) > 5
        tokens = [{"token": "50", "top_logprobs": [{"token": "50", "logprob": 0.0}]}]
        return (400, {"error": {"message": f"unsupported: {refused}"}}) if refused else (200, {**answered(tokens)})

    def answered(tokens: list[Any]) -> dict[str, Any]:
        return {"choices": [{"message": {"content": "50"}, "logprobs": {"content": tokens}}]}

    habits = {"limit_name": "max_completion_tokens", "temperature": None, "alternatives": 5}
    with serving(strict) as (url, asked):
        (found,) = judge(url, **habits).stream([("q", "r")], rubric="alignment")
        assert found.label != UNPARSED and asked[0]["max_completion_tokens"] == 4 and asked[0]["top_logprobs"] == 5
        for name in habits:  # and each of them is needed
            with pytest.raises(JudgeUnreachable, match="unsupported"):
                list(judge(url, **{key: value for key, value in habits.items() if key != name}).stream([("q", "r")], rubric="alignment"))
    with pytest.raises(ValueError, match="alternatives >= 1"):
        Endpoint(model="odd", alternatives=0)
