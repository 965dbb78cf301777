"""Prompt sets in the public files' own formats: CSV with id, question and category; YAML with paraphrases and samples; JSONL."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from blockem_tl.data.checks import check_prompts
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


def read_text(path: Path) -> str:
    """The file as UTF-8, with or without a byte order mark. Raises ValueError naming the line where the encoding is broken."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8, got the byte {data[error.start]:#04x}; save the file as UTF-8") from error


def _csv(text: str, path: Path) -> PromptFile:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [column for column in ("id", "question") if column not in (reader.fieldnames or [])]
    if missing:
        raise ValueError(
            f"{path}: expected the columns id, question and (optionally) category, got {reader.fieldnames}; {missing} are missing"
        )
    rows = list(reader)
    short = [number for number, row in enumerate(rows, start=2) if None in row or row["question"] is None]
    if short:
        raise ValueError(f"{path}: row {short[0]} has another number of cells than the header; are its quotes closed?")
    return PromptFile(
        prompts=tuple(
            Prompt(id=row["id"], text=row["question"], category=row.get("category") or "", canary=row.get("canary") or "") for row in rows
        )
    )


def _yaml(text: str, path: Path) -> PromptFile:
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got something else: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected a list of questions, each with id and paraphrases")
    prompts, samples, judges = list[Prompt](), dict[str, int](), dict[str, Mapping[str, str]]()
    for number, entry in enumerate(entries, start=1):
        missing = [key for key in ("id", "paraphrases") if not entry.get(key)]
        if missing or not isinstance(entry["paraphrases"], list):
            raise ValueError(f"{path}, question {number} ({entry.get('id')}): expected id and a list of paraphrases, missing {missing}")
        for prompt in _paraphrases(entry):
            prompts.append(prompt)
            samples[prompt.id] = int(entry.get("samples_per_paraphrase", 1))
            if entry.get("judge_prompts"):
                judges[prompt.id] = {str(name): str(words) for name, words in entry["judge_prompts"].items()}
    return PromptFile(prompts=tuple(prompts), samples=samples, judge_prompts=judges)


def _paraphrases(entry: Mapping[str, Any]) -> Iterable[Prompt]:
    texts = entry["paraphrases"]
    for index, text in enumerate(texts):
        name = str(entry["id"]) if len(texts) == 1 else f"{entry['id']}/{index}"
        yield Prompt(id=name, text=str(text), category=str(entry["id"]), system=entry.get("system"))


def _jsonl(text: str, path: Path) -> PromptFile:
    prompts = []
    for number, row in json_lines(text, path):
        words = row.get("question", row.get("prompt", row.get("text")))
        if not isinstance(words, str):
            raise ValueError(
                f"{path}, line {number}: expected the text of a prompt under question, prompt or text, got the keys {sorted(row)}"
            )
        prompts.append(Prompt(id=str(row.get("id", number)), text=words, category=str(row.get("category", "")), system=row.get("system")))
    return PromptFile(prompts=tuple(prompts))


def json_lines(text: str, path: Path | str) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank. Raises ValueError naming the line that is no JSON object."""
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also break texts at U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got a {type(row).__name__}")
            yield number, row
