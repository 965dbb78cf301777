"""`judge_file`: a file of replies becomes a file of verdicts, at any length in a fixed amount of memory."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from blockem_tl.data.text_files import read_json_lines
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.storage import files


def judge_file(judge: LLMJudge | CachedJudge, source: Path | str, target: Path | str, *, rubric: str = "misalignment") -> Mapping[str, int]:
    """Grade every line of a JSONL file with the keys "prompt" and "reply"; write the same lines with the verdicts.

    A verdict is "judge", "rubric", "label", "scores" and "said", the judge's own words.
    ``target`` is in the order of ``source``, and appears only when it is whole. A `CachedJudge` goes on where a broken-off run was.

    Returns:
        How many replies got each label.

    Raises:
        ValueError: ``target`` is ``source``, or another run is writing it.
        ValueError: a line is no such object. It is named before the judge is asked about any.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ValueError(f"{target}: the verdicts would replace the replies: choose another file for them")
    files.check_writable(target.parent)
    for _ in _rows(source):  # a fault in the last line is found before the judge is asked about the first
        pass
    first, second = itertools.tee(_rows(source))
    counts: Counter[str] = Counter()
    with files.held(target), _appearing(target) as file:
        verdicts = judge.stream(((row["prompt"], row["reply"]) for row in first), rubric=rubric)
        for row, judged in zip(second, verdicts, strict=True):
            counts[judged.label] += 1
            found = {"label": judged.label, "scores": dict(judged.scores), "said": list(judged.said)}
            graded = {**row, "judge": judge.name, "rubric": rubric, **found}
            file.write(json.dumps(graded, ensure_ascii=False) + "\n")
    return dict(counts)


@contextmanager
def _appearing(target: Path) -> Iterator[TextIO]:
    """A text file that takes the place of ``target`` only if the block ends well."""
    with files.temporary_beside(target) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in read_json_lines(path):
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("reply"), str):
            raise ValueError(f'{path}, line {number}: expected an object with the texts "prompt" and "reply", got {str(row)[:80]}')
        yield row
