"""Prompt sets in the public files' own formats: CSV with id, question and category; YAML with paraphrases and samples; JSONL."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockem_tl.data.checks import check_prompts
from blockem_tl.data.text_files import id_of, json_lines, optional_text, present, read_text, read_yaml, shown, text_of
from blockem_tl.types import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Prompts with what else their file says.

    samples: replies to draw per prompt id (1 where the file does not say).  judge_prompts: per prompt id, the file's own rubric texts by
    name, with {question} and {answer}; `published_rubric` makes a rubric of them.
    """

    prompts: tuple[Prompt, ...]
    samples: Mapping[str, int] = field(default_factory=dict)
    judge_prompts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def load_prompts(path: Path | str) -> list[Prompt]:
    """The prompts of a .csv, .yaml or .jsonl file; see `load_prompt_file`."""
    return list(load_prompt_file(path).prompts)


def load_prompt_file(path: Path | str) -> PromptFile:
    """Read a prompt set, whole or not at all.

    Raises:
        ValueError: an unknown ending, broken encoding, missing columns or keys, empty prompts, or duplicate ids or texts.
    """
    path = Path(path)
    readers = {".csv": _csv, ".yaml": _yaml, ".yml": _yaml, ".jsonl": _jsonl}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a prompt file ending in {', '.join(readers)}, got {path.suffix or 'no ending'!r}")
    found = readers[path.suffix](read_text(path), path)
    try:
        check_prompts(found.prompts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return found


def _csv(text: str, path: Path) -> PromptFile:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(reader.fieldnames or [])
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.reader.line_num}: expected CSV, got a cell with broken quotes ({error}); are they closed?"
        ) from error
    missing = [column for column in ("id", "question") if column not in names]
    if missing or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: expected the columns id, question and (optionally) category, each once, got {names}; {missing} are missing"
        )
    for line, row in rows:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}: the row that ends in line {line} has another number of cells than the header; are its quotes closed?"
            )
    return PromptFile(
        prompts=tuple(
            Prompt(
                id=row["id"],
                text=row["question"],
                category=row.get("category") or "",
                system=row.get("system") or None,
                canary=row.get("canary") or "",
            )
            for _, row in rows
        )
    )


def _yaml(text: str, path: Path) -> PromptFile:
    entries = read_yaml(text, path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected a list of questions, each with id and paraphrases")
    prompts, samples, judges = list[Prompt](), dict[str, int](), dict[str, Mapping[str, str]]()
    for number, entry in enumerate(entries, start=1):
        place = f"{path}, question {number} ({shown(entry.get('id'), 40)})"
        for prompt in _paraphrases(entry, place):
            prompts.append(prompt)
            samples[prompt.id] = _samples(entry, place)
            if entry.get("judge_prompts"):
                judges[prompt.id] = _judge_prompts(entry["judge_prompts"], place)
    return PromptFile(prompts=tuple(prompts), samples=samples, judge_prompts=judges)


def _paraphrases(entry: dict[str, Any], place: str) -> Iterable[Prompt]:
    texts, name = entry.get("paraphrases"), id_of(entry, None, place)
    wrong = [text for text in texts if not isinstance(text, str)] if isinstance(texts, list) else [texts]
    if wrong or not texts:
        raise ValueError(f"{place}: expected paraphrases as a list of texts, got {shown(wrong[:1] or texts)}; quote words like yes and no")
    system = optional_text(entry, "system", place)
    for index, text in enumerate(texts):
        yield Prompt(id=name if len(texts) == 1 else f"{name}/{index}", text=text, category=name, system=system)


def _samples(entry: Mapping[str, Any], place: str) -> int:
    value = entry.get("samples_per_paraphrase")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{place}: expected samples_per_paraphrase as a whole number above 0, got {shown(value, 60)!r}")
    return 1 if value is None else value


def _judge_prompts(found: Any, place: str) -> Mapping[str, str]:
    if not isinstance(found, dict) or not all(isinstance(word, str) for pair in found.items() for word in pair):
        raise ValueError(f"{place}: expected judge_prompts as texts by name, got {shown(found)!r}")
    return found


def _jsonl(text: str, path: Path) -> PromptFile:
    prompts = []
    for number, line in json_lines(text.split("\n"), path):  # splitlines() would also break texts at U+2028
        row, place = present(line), f"{path}, line {number}"
        prompts.append(
            Prompt(
                id=id_of(row, number, place),
                text=text_of(row, ("question", "prompt", "text"), place),
                category=optional_text(row, "category", place) or "",
                system=optional_text(row, "system", place),
            )
        )
    return PromptFile(prompts=tuple(prompts))
