"""Judging a file of replies, of any length, in a fixed amount of memory."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from blockem_tl.judging.judge import LLMJudge
from blockem_tl.storage import files


def judge_file(judge: LLMJudge, source: Path | str, target: Path | str, *, rubric: str = "misalignment") -> Mapping[str, int]:
    """Grade every line of a JSONL file with the keys "prompt" and "reply"; write the same lines with "judge", "rubric", "label", "scores".

    ``target`` appears only when whole, in the order of ``source``. With a store in the judge, a run broken off goes on where it was.

    Returns:
        How many replies got each label.

    Raises:
        ValueError: a line that is not such an object (naming it), before the judge is asked about any line after it.
    """
    source, target = Path(source), Path(target)
    files.check_writable(target.parent)
    first, second = itertools.tee(_rows(source))
    verdicts = judge.stream(((row["prompt"], row["reply"]) for row in first), rubric=rubric)
    counts: Counter[str] = Counter()
    temporary = target.with_name(f".{target.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row, judged in zip(second, verdicts, strict=True):
                counts[judged.label] += 1
                graded = {**row, "judge": judge.name, "rubric": rubric, "label": judged.label, "scores": dict(judged.scores)}
                file.write(json.dumps(graded, ensure_ascii=False) + "\n")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return dict(counts)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}") from error
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not isinstance(row.get("reply"), str):
                raise ValueError(f'{path}, line {number}: expected an object with the texts "prompt" and "reply", got {line[:80]!r}')
            yield row
