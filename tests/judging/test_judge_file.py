"""Files of verdicts are whole or absent, in the order of the replies, and written by one run at a time."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from scripted import Scripted

from blockem_tl.judging.backend import Completion, Request
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.files import judge_file
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.storage.store import Store


class Meanwhile(Scripted):
    """Does something while it is asked."""

    def __init__(self, meanwhile: Callable[[], object], *script: str) -> None:
        super().__init__(*script)
        self.meanwhile = meanwhile

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        self.meanwhile()
        return super().complete(requests)


def said(*script: str) -> LLMJudge:
    return LLMJudge(backend=Scripted(*script))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "q", "reply": "r"}\n')
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("cached", [False, True])
def test_a_file_is_judged_line_by_line(tmp_path: Path, cached: bool) -> None:
    rows = [{"id": i, "prompt": f"q{i}", "reply": "ü"} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    judge = said("ANSWER: 1", "ANSWER: 5", "ANSWER: REFUSAL")
    grader = CachedJudge(judge=judge, store=Store(tmp_path / "v.sqlite")) if cached else judge
    assert judge_file(grader, tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl") == {"1": 1, "5": 1, "REFUSAL": 1}
    written = [json.loads(line) for line in (tmp_path / "out" / "out.jsonl").read_text().splitlines()]
    graded = [{**r, "judge": "scripted", "rubric": "misalignment", "scores": {}} for r in rows]
    assert [{k: v for k, v in row.items() if k not in ("label", "said")} for row in written] == graded
    assert [row["label"] for row in written] == ["1", "5", "REFUSAL"] and names(tmp_path / "out") == ["out.jsonl"]


@pytest.mark.parametrize("line", ["not json", '["list"]', '{"prompt": "q"}', '{"prompt": "q", "reply": 3}'])
def test_a_bad_line_is_named_and_nothing_half_written_is_left(tmp_path: Path, source: Path, line: str) -> None:
    source.write_text(source.read_text() + line)
    with pytest.raises(ValueError, match="line 2: expected"):
        judge_file(said("ANSWER: 1"), source, tmp_path / "out.jsonl")
    assert names(tmp_path) == ["in.jsonl"]


def test_a_second_run_on_the_same_target_is_refused(tmp_path: Path, source: Path) -> None:
    target, seen = tmp_path / "out.jsonl", []

    def meanwhile() -> None:
        with pytest.raises(ValueError, match="out.jsonl: another run is writing it: wait"):
            judge_file(said("ANSWER: 5"), source, target)
        assert judge_file(said("ANSWER: 5"), source, tmp_path / "other.jsonl") == {"5": 1}  # another target is another matter
        seen.extend(names(tmp_path))

    assert judge_file(LLMJudge(backend=Meanwhile(meanwhile, "ANSWER: 1")), source, target) == {"1": 1}
    assert ".out.jsonl.lock" in seen and "out.jsonl" not in seen and len(seen) == 4
    assert names(tmp_path) == ["in.jsonl", "other.jsonl", "out.jsonl"]
    assert judge_file(said("ANSWER: 5"), source, target) == {"5": 1}  # one after the other is well


def test_verdicts_never_replace_the_replies(tmp_path: Path, source: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(source)
    for target in (source, tmp_path / "." / "in.jsonl", tmp_path / "link.jsonl"):
        with pytest.raises(ValueError, match="would replace the replies"):
            judge_file(said(), source, target)
    assert source.read_text() == '{"prompt": "q", "reply": "r"}\n' and names(tmp_path) == ["in.jsonl", "link.jsonl"]


def test_a_run_broken_off_goes_on_where_it_was(tmp_path: Path, source: Path) -> None:
    store, target = Store(tmp_path / "v.sqlite"), tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"q{i}", "reply": "r"}) + "\n" for i in range(3)))
    with pytest.raises(IndexError):  # the script is over
        judge_file(CachedJudge(judge=said("ANSWER: 1", "ANSWER: 2"), store=store), source, target)
    assert not target.exists() and len(store) == 2
    assert judge_file(CachedJudge(judge=said("ANSWER: 3"), store=store), source, target) == {"1": 1, "2": 1, "3": 1}
