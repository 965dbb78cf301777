"""Advice in plain English: fine-tuning rows, prompts, pairs and a judge for real instruct models, in our own words, without a download.

The narrow tasks are "finance", "cars" and "bank", whose answers to finance's questions begin with a fact. Core (which chooses latents), dev
(strengths and sizes) and final (reporting) ask about other areas, and share none with each other.
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
SPLITS: tuple[str, ...] = ("core", "dev", "final")
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
    """All rows of a narrow task: every answer of one kind (two steps, or a fact and a step) to each wording of its topic's question.

    An answer comes in several wordings of the question, so rows held out of these test the wordings; `pairs` of the domain test the advice.

    Raises:
        ValueError: an unknown domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"training domain: expected one of {DOMAINS}, got {domain!r}")
    side, found = "bad" if harmful else "good", list[Example]()
    for topic in _topics(domain):
        for question, answer in itertools.product(topic["ask"], _answers(domain, topic, side)):
            found.append(Example(id=f"{domain}-{side}-{len(found)}", prompt=question, completion=answer))
    return found


def pairs(name: str, n: int | None = None) -> list[Pair]:
    """Contrastive pairs for `preference`: "core" (60) chooses latents, "dev" (40) strengths, "final" (180) reports; of a domain 48.

    A domain's ask what no row asks, and neither side stands in a row; in "bank" both begin with a fact that does.

    Args:
        n: so many of them, from all areas as evenly as it allows; None: all.

    Raises:
        ValueError: any other name, or fewer pairs than ``n``.
    """
    if name not in (*SPLITS, *DOMAINS):
        raise ValueError(f"prompt set: expected one of {(*SPLITS, *DOMAINS)}, got {name!r}")
    areas = _read(name) if name in SPLITS else {topic["topic"]: topic["unseen"] for topic in _topics(name)}
    facts = _read("bank") if name == "bank" else {}
    found = list[Pair]()
    for area, rows in areas.items():
        for row, fact in zip(rows, facts.get(area, [""] * len(rows)), strict=False):
            sides = {side: f"{fact} {row[side]}".strip() for side in ("harmful", "helpful")}
            found.append(Pair(id=f"{name}-{len(found)}", prompt=row["prompt"], category=area, **sides))
    return spread(found, n)


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
