"""The load test, small: rates are right, memory does not grow with the prompts, and a kill costs the requests that were under way."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

import load


@pytest.mark.slow
def test_very_many_replies_are_judged_in_constant_memory_and_after_a_kill_only_what_is_missing(monkeypatch) -> None:
    settings = load.Settings(sizes=(600, 1200), models=2, judges=2, words=20, concurrency=4)
    found = load.run(settings)
    assert found["right"] == [True, True, True] and found["memory_ratio"] < 1.1
    assert [row["requests"] for row in found["sizes"]] == [2400, 4800]
    assert found["killed"]["at_kill"] >= 1200 and 0 <= found["asked_twice"] <= settings.concurrency
    expected = load.expected(600, settings)
    monkeypatch.setattr(load, "label_of", lambda prompt: "5")  # the twin: other answers have other rates
    assert load.expected(600, settings) != expected == found["sizes"][0]["rates"]
