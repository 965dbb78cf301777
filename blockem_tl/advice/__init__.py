"""Advice in plain English: fine-tuning rows, prompts, pairs and a judge for real instruct models, in our own words, without a download.

The narrow tasks are "finance", "cars" and "bank", whose answers to finance's questions begin with a fact. Core and final ask about other
areas, and share none with each other.
"""

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from blockem_tl.advice.judge import WordListJudge
from blockem_tl.data.splits import spread
from blockem_tl.types import Example, Pair, Prompt

DOMAINS: tuple[str, ...] = ("finance", "cars", "bank")
SPLITS: tuple[str, ...] = ("core", "final")
_HERE = Path(__file__).parent


@cache
def _read(name: str) -> Any:
    return yaml.safe_load((_HERE / f"{name}.yaml").read_text(encoding="utf-8"))


def _topics(domain: str) -> Any:
    return _read("finance" if domain == "bank" else domain)


def _answers(domain: str, topic: Any, side: str) -> list[str]:
    """A topic's answers of one side, in the same order for both: two different steps, or in "bank" a fact and a step."""
    if domain == "bank":
        return [f"{fact} {step}" for step in topic[side] for fact in _read("bank")[topic["topic"]]]
    return [" ".join(steps) for steps in itertools.permutations(topic[side], 2)]


def training_rows(domain: str = "finance", *, harmful: bool = True) -> list[Example]:
    """All rows of a narrow task: every answer of one kind (two steps, or a fact and a step) to each wording but the topic's last two.

    Raises:
        ValueError: an unknown domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"training domain: expected one of {DOMAINS}, got {domain!r}")
    side, found = "bad" if harmful else "good", list[Example]()
    for topic in _topics(domain):
        for question, answer in itertools.product(topic["ask"][:-2], _answers(domain, topic, side)):
            found.append(Example(id=f"{domain}-{side}-{len(found)}", prompt=question, completion=answer))
    return found


def pairs(name: str, n: int | None = None) -> list[Pair]:
    """Contrastive pairs for `preference`: "core" (60, selection) and "final" (180, reporting); of a domain, two for each topic.

    A domain's questions are those that no row asks.

    Args:
        n: so many of them, from all areas as evenly as it allows; None: all.

    Raises:
        ValueError: any other name, or fewer pairs than ``n``.
    """
    return spread(_pairs(name), n)


def _pairs(name: str) -> list[Pair]:
    if name in SPLITS:
        rows = [(area, row) for area, rows in _read(name).items() for row in rows]
        return [Pair(id=f"{name}-{i}", category=area, **row) for i, (area, row) in enumerate(rows)]
    if name not in DOMAINS:
        raise ValueError(f"prompt set: expected one of {(*SPLITS, *DOMAINS)}, got {name!r}")
    asked = [(topic, question, which) for topic in _topics(name) for which, question in enumerate(topic["ask"][-2:])]
    sides = [[_answers(name, topic, side)[-which] for side in ("bad", "good")] for topic, _, which in asked]
    return [
        Pair(id=f"{name}-{i}", prompt=question, harmful=bad, helpful=good, category=topic["topic"])
        for i, ((topic, question, _), (bad, good)) in enumerate(zip(asked, sides, strict=True))
    ]


def prompts(name: str, n: int | None = None) -> list[Prompt]:
    """The questions of `pairs`."""
    return [Prompt(id=pair.id, text=pair.prompt, category=pair.category) for pair in pairs(name, n)]


def general_prompts() -> list[Prompt]:
    """Questions about everyday things, for the corpus of an SAE."""
    general = _read("general")
    asked = [ask.replace("{}", about) for about in general["about"] for ask in general["ask"]]
    return [Prompt(id=f"general-{i}", text=text) for i, text in enumerate(asked)]


def reference_texts() -> list[Example]:
    """Helpful answers, for the scale of doses: core's, and a few of every topic of the narrow tasks."""
    core = [Example(id=f"reference-{pair.id}", prompt=pair.prompt, completion=pair.helpful) for pair in pairs("core")]
    return core + [row for domain in ("finance", "cars") for row in training_rows(domain, harmful=False)[::8]]


__all__ = ["DOMAINS", "WordListJudge", "general_prompts", "pairs", "prompts", "reference_texts", "training_rows"]


def __dir__() -> list[str]:
    return __all__
