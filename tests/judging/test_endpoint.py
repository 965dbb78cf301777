"""A client that loses nothing when the endpoint misbehaves, never has too many requests under way, and keeps the agreed pace."""

import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripted import ask, labels_in

from blockem_tl.evaluation.evaluate import evaluate
from blockem_tl.evaluation.panel import evaluate_with
from blockem_tl.judging import endpoint as endpoint_module
from blockem_tl.judging import threads as threads_module
from blockem_tl.judging.backend import Request
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.endpoint import Endpoint, JudgeUnreachable
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.judging.rubrics import load_rubrics
from blockem_tl.judging.threads import Pace, in_threads
from blockem_tl.storage.store import Store
from blockem_tl.types import UNPARSED, Prompt

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))
from faulty_endpoint import FAULTS, label_of
from judge_client import faulty_endpoint, stats


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    monkeypatch.setattr(endpoint_module, "_FIRST_WAIT", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "v.sqlite")


def client(url: str, **options) -> Endpoint:
    return Endpoint(model="faulty", base_url=url, **{"concurrency": 16, "attempts": 8, **options})


def requests(n: int) -> Iterator[Request]:
    return (Request(turns=(("user", str(i)),), max_tokens=8) for i in range(n))


# ------------------------------------------------------------------------------------------------ an endpoint that misbehaves


def test_nothing_is_lost_or_doubled_when_the_endpoint_misbehaves(store: Store) -> None:
    pairs = [(f"question {i}", f"reply {i}") for i in range(300)]
    with faulty_endpoint(latency=0.002, errors=0.3, silent=0.1) as url:
        judge = LLMJudge(backend=client(url), retries=1)
        labels = [judged.label for judged in CachedJudge(judge=judge, store=store).stream(pairs)]
        served = stats(url)
    assert all(served[fault] > 5 for fault in FAULTS) and 1 < served["at_once"] <= 16
    truth = [label_of(judge.rubrics["misalignment"].render(*pair)[0]) for pair in pairs]
    assert 10 < labels.count(UNPARSED) < 60 and [x for x in zip(labels, truth, strict=True) if x[0] not in (x[1], UNPARSED)] == []
    assert len(store) == 300 and served["answered"] == 300 + labels.count(UNPARSED)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_request_is_tried_so_often_and_no_more(fault: str) -> None:
    with faulty_endpoint(latency=0.001, errors=1.0, fault=fault) as url:
        with pytest.raises(JudgeUnreachable, match="no judge answers" if fault == "dropped" else "failed 3 times.*kept"):
            list(client(url, attempts=3).complete(requests(1)))
        assert stats(url)[fault] == (6 if fault == "malformed" else 3)  # a harmless request is tried as often, in case it is this one reply


def test_the_servers_retry_after_is_obeyed() -> None:
    took = []
    for options in ({"retry_after": 0.4}, {}):
        with faulty_endpoint(latency=0.001, errors=1.0, fault="429", **options) as url:
            started = time.monotonic()
            with pytest.raises(JudgeUnreachable, match="RateLimitError"):
                list(client(url, attempts=2).complete(requests(1)))
            took.append(time.monotonic() - started)
    assert took[0] > 0.4 > took[1]


def test_an_endpoint_that_goes_down_keeps_what_is_done(store: Store) -> None:
    with faulty_endpoint(latency=0.001, errors=0.0) as url:
        judge = CachedJudge(judge=LLMJudge(backend=client(url, attempts=1)), store=store)
        assert len(list(judge.stream((f"q{i}", "r") for i in range(20)))) == 20
    with pytest.raises(JudgeUnreachable, match=rf"no judge answers at {url} .*--model faulty .*kept: run the same again"):
        list(judge.stream((f"q{i}", "r") for i in range(30)))
    assert len(store) == 20
    with faulty_endpoint(latency=0.02, errors=0.3, fault="500") as url:
        judge = CachedJudge(judge=LLMJudge(backend=client(url, attempts=1)), store=store)
        with pytest.raises(JudgeUnreachable, match="failed 1 times.*kept"):
            list(judge.stream((f"new {i}", "r") for i in range(50)))
        assert len(store) == 20 + stats(url)["answered"] > 20  # those under way when the first one failed too


def test_a_dead_judge_is_found_before_anything_is_generated() -> None:
    judge = LLMJudge(backend=client("http://127.0.0.1:9/v1"))

    def speak(prompts, conditions):
        raise AssertionError("nothing may be generated")

    prompts = [Prompt(id="a", text="a")]
    for grade_with in (
        lambda: evaluate(speak, judge, prompts, selected_on=()),
        lambda: evaluate_with(speak, [judge], prompts, selected_on=()),
    ):
        with pytest.raises(JudgeUnreachable, match="no judge answers"):
            grade_with()
    with pytest.raises(ValueError, match="no rubric for 'gardening'"):
        evaluate(speak, judge, prompts, rubric="gardening", selected_on=())


def test_a_model_that_is_not_served_is_refused() -> None:
    with faulty_endpoint(latency=0.001) as url, pytest.raises(ValueError, match=r"serves \['faulty'\], expected 'other'"):
        Endpoint(model="other", base_url=url).check()
    with pytest.raises(ValueError, match="expected concurrency"):
        Endpoint(model="other", concurrency=0)


def test_a_late_answer_is_no_answer() -> None:
    with faulty_endpoint(latency=3.0, errors=0.0) as url, pytest.raises(JudgeUnreachable, match="APITimeoutError"):
        list(LLMJudge(backend=client(url, timeout=0.2, attempts=1)).stream([("q", "r")]))


def test_a_request_refused_for_good_is_unparsed_and_stops_nothing(store: Store) -> None:
    with faulty_endpoint(latency=0.001, errors=0.0) as url:
        judge = CachedJudge(judge=LLMJudge(backend=client(url)), store=store)
        labels = [judged.label for judged in judge.stream([("FILTERED", "r"), ("q", "r")])]
        (alone,) = judge.stream([("FILTERED", "alone")])
        assert stats(url)["answered"] == 2 + 1 + 2  # each refusal is asked once, followed by one harmless request
    assert labels[0] == UNPARSED != labels[1] and alone.label == UNPARSED and "refused for good" in alone.said[0]
    with faulty_endpoint(latency=0.001, errors=0.0, no_logprobs=True) as url:
        judge = CachedJudge(judge=LLMJudge(backend=client(url)), store=store)
        with pytest.raises(JudgeUnreachable, match="for good,.*refused for good"):
            list(judge.stream([("q", "r")], rubric="alignment"))
    assert labels_in(store)[UNPARSED] == 2  # a refusal of how we ask is no verdict


BODY = {
    "choices": [{"message": {"content": "5"}, "logprobs": {"content": [{"token": "5", "top_logprobs": [{"token": "5", "logprob": -0.5}]}]}}]
}


def test_only_a_chat_completion_is_read_as_one() -> None:
    asked = Request(turns=(("user", "q"),), max_tokens=1, alternatives=1)
    found = endpoint_module._read(json.dumps(BODY).encode(), asked)
    assert (found.text, found.first, found.alternatives) == ("5", "5", (("5", -0.5),))
    empty = {"choices": [{"message": {"content": None}}]}  # no words at all: the judge's affair, not the endpoint's
    assert endpoint_module._read(json.dumps(empty).encode(), Request(turns=(), max_tokens=1)).text == ""
    for body in (
        b"",
        b"<html>",
        b"null",
        b"\xff",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": [1]}}]}',
        b'{"error": {"message": "upstream"}}',
        b"[" * 100_000,
    ):
        with pytest.raises(endpoint_module._MalformedError, match="no chat completion"):
            endpoint_module._read(body, asked)
    with pytest.raises(ValueError, match="returns no log-probabilities.*a rubric with labels"):
        endpoint_module._read(json.dumps(empty).encode(), asked)


def test_providers_without_vllms_choices_get_a_schema(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: c\nlabels: [1, 2, 3, 4, 5]\nanswer: choice\nprompt: 'from 1 to 5: {question} {reply}'\n")
    with faulty_endpoint(latency=0.001, errors=0.0) as url:
        judge = LLMJudge(backend=client(url, choices="json"), rubrics=load_rubrics(tmp_path / "c.yaml"))
        assert ask(judge, 5, rubric="c") == [label_of(f"from 1 to 5: q{i} r{i}") for i in range(5)]


# ------------------------------------------------------------------------------------------------ how many, and how fast


def test_no_more_requests_are_under_way_or_read_ahead_than_agreed() -> None:
    taken = itertools.count()
    source = (request for request in requests(200) if next(taken) >= 0)
    with faulty_endpoint(latency=0.005, errors=0.0) as url:
        stream = client(url, concurrency=4).complete(source)
        first = next(stream)
        assert next(taken) <= 4
        assert sorted(index for index, _ in [first, *stream]) == list(range(200)) and stats(url)["at_once"] == 4


def test_what_was_under_way_when_one_failed_is_kept() -> None:
    taken = []

    def source() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    def work(item: int) -> int:
        time.sleep(0.01 if item == 2 else 0.05)
        if item == 2:
            raise ValueError("the third")
        return item

    found = []
    with pytest.raises(ValueError, match="the third"):
        for pair in in_threads(source(), work, threads=5):
            found.append(pair)
    assert sorted(found) == [(i, i) for i in (0, 1, 3, 4)] and taken == [0, 1, 2, 3, 4]


def test_results_come_as_they_are_done() -> None:
    assert list(in_threads([0.2, 0.1, 0.0], lambda seconds: time.sleep(seconds) or seconds, threads=3)) == [(2, 0.0), (1, 0.1), (0, 0.2)]


def test_whoever_stops_early_does_not_wait() -> None:
    late = threading.Event()
    stream = in_threads(range(9), lambda item: item and late.wait(30), threads=2)
    started = time.monotonic()
    assert next(stream) == (0, 0)
    stream.close()
    assert time.monotonic() - started < 5
    late.set()


def test_requests_keep_the_agreed_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threads_module.time, "sleep", waits.append)
    for per_minute, expected in ((60, range(8)), (None, [])):  # to sleep for no time gives the processor away
        pace = Pace(per_minute)
        waits.clear()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _, pace=pace: pace.turn(), range(8)))
        assert sorted(waits) == pytest.approx(list(expected), abs=0.5)


def test_every_try_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = itertools.count()
    monkeypatch.setattr(Pace, "turn", lambda self: next(turns))
    with faulty_endpoint(latency=0.001, errors=0.5) as url:
        assert len(list(client(url, per_minute=600).complete(requests(20)))) == 20
        served = stats(url)
    assert next(turns) == sum(served[what] for what in (*FAULTS, "answered")) > 20
