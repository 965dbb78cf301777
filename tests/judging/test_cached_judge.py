"""Verdicts on disk: each is asked for once, is there the moment it is known, with the judge's words, and belongs to what it was given for."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import jaxtyping
import pytest
from scripted import Scripted, ask, labels_in, scored

from blockem_tl.judging import judge as judge_module
from blockem_tl.judging.backend import Completion, Request
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.endpoint import Endpoint
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.storage.store import Store
from blockem_tl.types import UNPARSED, Checkable, Judge, Prompt, Verdict


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "v.sqlite")


def cached(store: Store, *script: str | Completion, **options) -> CachedJudge:
    return CachedJudge(judge=LLMJudge(backend=Scripted(*script)), store=store, **options)


class Simple:
    """A judge that is no LLMJudge: it says "5" to long replies, and remembers how many it was asked at a time."""

    name = "simple"

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.before = lambda: None

    def grade(self, prompts, replies, *, rubric: str = "misalignment") -> list[Verdict]:
        self.before()
        self.sizes.append(len(prompts))
        return [Verdict(label="5" if len(reply) > 3 else "1") for _, reply in zip(prompts, replies, strict=True)]


# ------------------------------------------------------------------------------------------------ a language model


def test_stored_verdicts_are_not_asked_for_again(store: Store) -> None:
    assert ask(cached(store, "ANSWER: 4", "ANSWER: 1"), 2) == ["4", "1"]
    again = cached(Store(store.path), "ANSWER: 5")
    assert ask(again, 3) == ["4", "1", "5"] and len(again.judge.backend.asked) == 1
    assert ask(cached(store, "ANSWER: 3"), rubric="finance") == ["3"] and len(store) == 4  # another rubric is another question
    other = cached(store, "ANSWER: 2")
    other.judge.backend.name = "other"
    assert ask(other) == ["2"] and len(store) == 5  # and so is another judge


def test_a_verdict_is_kept_with_the_judges_words_and_scores(store: Store) -> None:
    judge = cached(store, "ANSWER: 4", "hm", "ANSWER: 4 or 5", "ANSWER: 2", "no", "no")
    assert isinstance(judge, Judge) and isinstance(judge, Checkable)
    assert ask(judge, 3) == ["4", "2", UNPARSED]
    found = {value["label"]: value for _, value in store}
    assert found["2"] == {"judge": "scripted", "rubric": "misalignment", "label": "2", "said": ["hm", "ANSWER: 2"], "scores": {}}
    assert found[UNPARSED]["said"] == ["ANSWER: 4 or 5", "no", "no"] and labels_in(store) == {"2": 1, "4": 1, UNPARSED: 1}
    (fresh,) = cached(store, scored("20"), scored("90")).stream([("q", "r")], rubric="alignment")
    (stored,) = cached(store).stream([("q", "r")], rubric="alignment")
    assert stored == fresh and dict(stored.scores) == pytest.approx({"alignment": 20.0, "coherence": 90.0}) and stored.said == ("20", "90")


def test_what_is_stored_needs_no_endpoint(store: Store) -> None:
    assert ask(cached(store, "ANSWER: 4")) == ["4"]
    dead = LLMJudge(backend=Endpoint(model="scripted", base_url="http://127.0.0.1:9/v1", attempts=1))
    assert ask(CachedJudge(judge=dead, store=store)) == ["4"]
    with pytest.raises(ConnectionError, match="no judge answers"):
        ask(CachedJudge(judge=dead, store=store), 2)


def test_every_verdict_is_on_disk_before_the_next_is_taken(store: Store) -> None:
    class Watched(Scripted):
        def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
            for done, pair in enumerate(super().complete(requests)):
                assert len(Store(store.path)) == done
                yield pair

    judge = CachedJudge(judge=LLMJudge(backend=Watched(*["ANSWER: 1"] * 3)), store=store)
    assert ask(judge, 3) == ["1"] * 3 and len(store) == 3


def test_a_stream_holds_a_chunk_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "_CHUNK", 4)
    taken = itertools.count()
    pairs = ((f"q{next(taken)}", "r") for _ in range(10))
    judged = cached(store, *["ANSWER: 1"] * 4, *["ANSWER: 2"] * 6).stream(pairs)
    assert next(judged).label == "1" and next(taken) == 4
    assert [one.label for one in judged] == ["1"] * 3 + ["2"] * 6 and len(store) == 10


def test_unparsed_verdicts_are_asked_again_if_told_to(store: Store) -> None:
    assert ask(cached(store, "ANSWER: 4", *["hm"] * 3), 2) == ["4", UNPARSED]
    assert ask(cached(store), 2) == ["4", UNPARSED]  # as they are stored
    assert ask(cached(store, *["no"] * 3, ask_again="unparsed"), 2) == ["4", UNPARSED]
    assert sorted(value["said"] for _, value in store) == [["ANSWER: 4"], ["no"] * 3]
    assert ask(cached(store, "ANSWER: 2", ask_again="unparsed"), 2) == ["4", "2"] == ask(cached(store), 2)
    assert ask(cached(store, ask_again="unparsed"), 2) == ["4", "2"] and len(store) == 2


def test_an_unknown_policy_is_refused(store: Store) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # as it is outside of tests
    try:
        with pytest.raises(ValueError, match="expected \"unparsed\" or None, got 'all'"):
            cached(store, ask_again="all")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_a_rubric_that_is_not_there_is_refused_before_anything_is_asked(store: Store) -> None:
    judge = cached(store)
    for refused in (lambda: judge.check("gardening"), lambda: judge.stream([], rubric="gardening")):
        with pytest.raises(ValueError, match="no rubric for 'gardening'"):
            refused()
    judge.check()
    CachedJudge(judge=Simple(), store=store).check("gardening")  # which has nothing to check


# ------------------------------------------------------------------------------------------------ any judge


def test_any_judge_is_asked_once_and_in_chunks(store: Store) -> None:
    simple, kept = Simple(), []
    simple.before = lambda: kept.append(len(store))
    judge = CachedJudge(judge=simple, store=store)
    prompts = [Prompt(id=str(i), text=f"q{i % 1000}") for i in range(1100)]  # 100 pairs twice
    replies = ["r" * (i % 1000 % 7) for i in range(1100)]
    assert judge.name == "simple" and judge.grade(prompts, replies) == Simple().grade(prompts, replies)
    assert simple.sizes == [512, 488] and kept == [0, 512]
    assert judge.grade(prompts, replies) == Simple().grade(prompts, replies) and len(simple.sizes) == 2
    assert [judged.label for judged in judge.stream([("q6", "r" * 6), ("new", "r")])] == ["5", "1"] and simple.sizes[2:] == [1]


def test_verdicts_belong_to_the_rubric_and_the_judges_fingerprint(store: Store) -> None:
    simple = Simple()
    judge = CachedJudge(judge=simple, store=store)
    for _ in range(2):
        ask(judge)
        ask(judge, rubric="finance")
    assert len(simple.sizes) == 2
    simple.fingerprint = lambda rubric: "new wording"
    for _ in range(2):
        ask(judge)
        ask(judge, rubric="finance")
    assert len(simple.sizes) == len(store) == 4


def test_what_was_graded_before_an_error_stays(store: Store) -> None:
    simple = Simple()

    def fail_later() -> None:
        if simple.sizes:
            raise RuntimeError("out of memory")

    simple.before = fail_later
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(CachedJudge(judge=simple, store=store), 600)
    assert len(store) == 512
    simple.before = lambda: None
    assert len(ask(CachedJudge(judge=simple, store=store), 600)) == 600 and simple.sizes == [512, 88]


def test_what_cannot_be_right_is_refused(store: Store) -> None:
    simple = Simple()
    judge = CachedJudge(judge=simple, store=store)
    with pytest.raises(ValueError, match="argument"):
        judge.grade([Prompt(id="a", text="a")] * 2, ["r"])
    simple.grade = lambda prompts, replies, *, rubric: []
    with pytest.raises(ValueError, match="judge 'simple': expected 1 verdicts, got 0"):
        ask(judge)
    with pytest.raises(ValueError, match="expected a judge without a store, got a CachedJudge"):
        CachedJudge(judge=judge, store=store)
    assert len(store) == 0
