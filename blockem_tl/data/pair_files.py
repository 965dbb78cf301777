"""Contrastive pairs: a question with a harmful and a helpful answer, in JSON lines."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from blockem_tl.data.text_files import id_of, optional_text, present, read_json_lines, text_of
from blockem_tl.storage import files
from blockem_tl.types import Pair

LONGEST_RATIO = 2.0
"""A side may have so many times the other's words at most: a mean over far more tokens is another kind of number."""


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Raise ValueError for no pairs, repeated ids, a side that is missing, both sides alike, or sides of very unequal length."""
    if not pairs:
        raise ValueError("expected at least one pair, got none")
    repeated = [name for name, count in Counter(pair.id for pair in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"duplicate pair ids: {repeated[:3]}; a pair counted twice makes intervals too narrow")
    for pair in pairs:
        for side in ("prompt", "harmful", "helpful"):
            if not getattr(pair, side).strip():
                raise ValueError(f"pair {pair.id!r} has an empty {side}: every pair needs a question and two answers")
        if pair.harmful.strip() == pair.helpful.strip():
            raise ValueError(f"pair {pair.id!r}: its two answers are the same, so there is nothing to prefer")
        if not alike(pair):
            short, long = sorted(len(text.split()) for text in (pair.harmful, pair.helpful))
            raise ValueError(
                f"pair {pair.id!r}: its answers have {short} and {long} words, expected like lengths (a factor of "
                f"{LONGEST_RATIO:g} at most): shorten one, or the length would be what is measured"
            )


def alike(pair: Pair) -> bool:
    """Whether its two answers are of like length."""
    short, long = sorted(len(text.split()) for text in (pair.harmful, pair.helpful))
    return long <= LONGEST_RATIO * short + 2


def load_pairs(path: Path | str) -> list[Pair]:
    """Read pairs, each line an object with prompt, harmful and helpful, and perhaps id, category and system.

    Raises:
        ValueError: a line that is no such object, by its number; or pairs that `check_pairs` refuses.
    """
    path, pairs = Path(path), list[Pair]()
    for number, line in read_json_lines(path):
        row, place = present(line), f"{path}, line {number}"
        pairs.append(
            Pair(
                id=id_of(row, number, place),
                prompt=text_of(row, ["prompt"], place),
                harmful=text_of(row, ["harmful"], place),
                helpful=text_of(row, ["helpful"], place),
                category=optional_text(row, "category", place) or "",
                system=optional_text(row, "system", place),
            )
        )
    try:
        check_pairs(pairs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return pairs


def write_pairs(path: Path | str, pairs: Sequence[Pair]) -> Path:
    """Write pairs as JSON lines; readable by `load_pairs`."""
    kept = ({key: value for key, value in asdict(pair).items() if value or (key, value) == ("system", "")} for pair in pairs)
    lines = [json.dumps(row, ensure_ascii=False) for row in kept]
    return files.write_text(path, "\n".join(lines) + "\n")
