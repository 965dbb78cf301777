"""Splits made before any training, and what leaks between sets in spite of them."""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from blockem_tl.data.checks import normalise
from blockem_tl.types import Example, Pair, Prompt

_Asked = TypeVar("_Asked", Prompt, Pair)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training rows and held-out in-domain rows that share no question. ``dropped``: rows left out since their question came before."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    dropped: tuple[str, ...]
    seed: int

    def report(self) -> dict[str, Any]:
        """Sizes, the seed, and the number of questions that both sides share (0, or the split is broken)."""
        shared = {normalise(row.prompt) for row in self.train} & {normalise(row.prompt) for row in self.heldout}
        return {
            "train": len(self.train),
            "heldout": len(self.heldout),
            "repeated_rows_dropped": len(self.dropped),
            "shared": len(shared),
            "seed": self.seed,
        }


def spread(rows: Sequence[_Asked], n: int | None) -> list[_Asked]:
    """``n`` prompts or pairs with all categories as evenly as ``n`` allows, evenly spaced in each, in their order; None: all of them.

    No chance is in it: the same ``n`` gives the same ones.

    Raises:
        ValueError: n below 1, or more than there are.
    """
    if n is None:
        return list(rows)
    if not 1 <= n <= len(rows):
        raise ValueError(f"expected n in 1..{len(rows)}, the number of prompts there, or None for all, got {n}")
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row.category, []).append(i)
    quota = dict.fromkeys(places, 0)
    for category in itertools.cycle(places):
        if sum(quota.values()) == n:
            break
        quota[category] += quota[category] < len(places[category])
    chosen = [mine[i * len(mine) // quota[name]] for name, mine in places.items() for i in range(quota[name])]
    return [rows[i] for i in sorted(chosen)]


def split_rows(rows: Sequence[Example], *, train: int | None = None, heldout: int = 100, seed: int = 0) -> Split:
    """Draw held-out rows and training rows, disjoint after normalising (case, white space, punctuation).

    Held-out rows come first, so that they are the same whatever the number of training rows; the order of ``rows`` does not matter.

    Args:
        train: how many; None takes all that are left (5900 of a public file of 6000 different questions).

    Raises:
        ValueError: fewer distinct questions than asked for.
    """
    first: dict[str, Example] = {}
    dropped = []
    for row in sorted(rows, key=lambda row: (normalise(row.prompt), row.completion, row.id)):
        if first.setdefault(normalise(row.prompt), row) is not row:
            dropped.append(row.id)
    distinct = list(first.values())
    wanted = 1 if train is None else train
    if wanted < 1 or heldout < 1 or len(distinct) < wanted + heldout:
        raise ValueError(
            f"split: expected at least {wanted} + {heldout} rows with different questions, got {len(distinct)} "
            f"({len(dropped)} repeat another); ask for fewer"
        )
    random.Random(seed).shuffle(distinct)
    end = None if train is None else heldout + train
    return Split(train=tuple(distinct[heldout:end]), heldout=tuple(distinct[:heldout]), dropped=tuple(dropped), seed=seed)


def heldout_prompts(split: Split, *, category: str = "") -> list[Prompt]:
    """The held-out rows' questions, to be answered and graded for in-domain adherence."""
    return [Prompt(id=row.id, text=row.prompt, category=category, system=row.system) for row in split.heldout]


def leave_out(prompts: Iterable[Prompt], *others: Iterable[Prompt | Example]) -> list[Prompt]:
    """The prompts that are in none of the other sets, after normalising: how reporting prompts are made from public files."""
    known = {key for other in others for key in _questions(other)}
    return [prompt for prompt in prompts if normalise(prompt.text) not in known]


def leak_report(sets: Mapping[str, Iterable[Prompt | Example]]) -> list[dict[str, Any]]:
    """One row for every two sets: their sizes, how many questions they share after normalising, and which.

    ``inside``: ids of questions that are not the same but contain a question of the other set, as variants with a template do.
    """
    texts = {name: _questions(items) for name, items in sets.items()}
    names, rows = list(texts), []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = [key for key in texts[one] if key in texts[other]]
            row = {"first": one, "second": other, "n_first": len(texts[one]), "n_second": len(texts[other]), "shared": len(shared)}
            inside = [*_containing(texts[one], texts[other]), *_containing(texts[other], texts[one])]
            rows.append({**row, "ids": [texts[one][key] for key in shared], "inside": inside})
    return rows


def _containing(longer: Mapping[str, str], shorter: Mapping[str, str]) -> list[str]:
    """Ids of the texts in ``longer`` that have a whole text of ``shorter`` inside them, and more."""
    candidates = [f" {text} " for text in shorter if len(text.split()) > 2]  # "hello" is in too many questions to mean anything
    return [name for text, name in longer.items() if any(c in f" {text} " and c != f" {text} " for c in candidates)]


def _questions(items: Iterable[Prompt | Example]) -> dict[str, str]:
    return {normalise(item.text if isinstance(item, Prompt) else item.prompt): item.id for item in items}
