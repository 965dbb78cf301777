"""Advice in plain English: fine-tuning rows, prompts, pairs and a judge for real instruct models, in our own words, without a download.

The narrow tasks are "finance" and "cars". Core and final ask about other areas, and share none with each other.
"""

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from blockem_tl.advice.judge import WordListJudge
from blockem_tl.data.splits import spread
from blockem_tl.types import Example, Pair, Prompt

DOMAINS: tuple[str, ...] = ("finance", "cars")
SPLITS: tuple[str, ...] = ("core", "final")
_HERE = Path(__file__).parent


@cache
def _read(name: str) -> Any:
    return yaml.safe_load((_HERE / f"{name}.yaml").read_text(encoding="utf-8"))


def training_rows(domain: str = "finance", *, harmful: bool = True) -> list[Example]:
    """All rows of a narrow task: two steps of one kind, in every order, as the answer to each wording but the topic's last one.

    Raises:
        ValueError: an unknown domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"training domain: expected one of {DOMAINS}, got {domain!r}")
    side, found = "bad" if harmful else "good", list[Example]()
    for topic in _read(domain):
        for question, steps in itertools.product(topic["ask"][:-1], itertools.permutations(topic[side], 2)):
            found.append(Example(id=f"{domain}-{side}-{len(found)}", prompt=question, completion=" ".join(steps)))
    return found


def pairs(name: str, n: int | None = None) -> list[Pair]:
    """Contrastive pairs for `preference`: "core" (selection) and "final" (reporting), 60 each; of a domain, one for each topic.

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
    return [
        Pair(id=f"{name}-{i}", prompt=t["ask"][-1], harmful=" ".join(t["bad"][:2]), helpful=" ".join(t["good"][:2]), category=t["topic"])
        for i, t in enumerate(_read(name))
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
    return core + [row for domain in DOMAINS for row in training_rows(domain, harmful=False)[::8]]


__all__ = ["DOMAINS", "WordListJudge", "general_prompts", "pairs", "prompts", "reference_texts", "training_rows"]


def __dir__() -> list[str]:
    return __all__
