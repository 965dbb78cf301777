"""`CachedJudge`: any judge with its verdicts in a `Store`, so that equal replies are graded once and never again."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from blockem_tl.judging.judge import Judged, LLMJudge, chunks
from blockem_tl.judging.rubrics import find_rubric
from blockem_tl.storage.store import Store
from blockem_tl.types import UNPARSED, Checkable, Judge, Prompt, Verdict

_AT_ONCE = 512  # replies that a judge other than an LLMJudge grades between one writing to disk and the next


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedJudge:
    """A judge that looks verdicts up, asks for those that are missing, and keeps each as soon as it is there; implements `Judge`.

    Verdicts of an `LLMJudge` are kept under its name, the rubric's contents and the texts, each as it comes, with the judge's own words.
    Verdicts of any other judge are kept under its name, the rubric's name and the texts, 512 at a time. If its grading changes, it must
    change its name, or have a method ``fingerprint(rubric)`` that returns something else from then on.

    ask_again: "unparsed" asks again for stored verdicts that could not be parsed, and replaces them.
    """

    judge: Judge
    store: Store
    ask_again: Literal["unparsed"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.judge, CachedJudge):
            raise ValueError("expected a judge without a store, got a CachedJudge: use it as it is, or cache the judge inside it")
        if self.ask_again not in ("unparsed", None):
            raise ValueError(f'ask_again: expected "unparsed" or None, got {self.ask_again!r}')

    @property
    def name(self) -> str:
        """The judge's name."""
        return self.judge.name

    def check(self, rubric: str = "misalignment") -> None:
        """Raise if the judge could not grade; see `Checkable`."""
        if isinstance(self.judge, Checkable):
            self.judge.check(rubric)

    def grade(self, prompts: Sequence[Prompt], replies: Sequence[str], *, rubric: str = "misalignment") -> list[Verdict]:
        """One verdict per (prompt, reply), in order. Raises what the judge raises; what was graded before stays in the store."""
        if len(prompts) != len(replies):
            return self.judge.grade(prompts, replies, rubric=rubric)  # which knows how to say that this is wrong
        return [judged.verdict for judged in self._stream(zip(prompts, replies, strict=True), rubric)]

    def stream(self, pairs: Iterable[tuple[str, str]], *, rubric: str = "misalignment") -> Iterator[Judged]:
        """The verdicts of (question, reply) pairs, in order, holding a few thousand at a time. Raises what the judge raises."""
        return self._stream(((Prompt(id="", text=question), reply) for question, reply in pairs), rubric)

    def _stream(self, pairs: Iterable[tuple[Prompt, str]], rubric: str) -> Iterator[Judged]:
        contents = self._contents(rubric)
        return (judged for chunk in chunks(pairs) for judged in self._chunk(chunk, rubric, contents))

    def _contents(self, rubric: str) -> str:
        if isinstance(self.judge, LLMJudge):
            return find_rubric(self.judge.rubrics, rubric).fingerprint
        fingerprint = getattr(self.judge, "fingerprint", None)
        return f"{rubric}\0{fingerprint(rubric)}" if callable(fingerprint) else rubric

    def _chunk(self, pairs: Sequence[tuple[Prompt, str]], rubric: str, contents: str) -> list[Judged]:
        keys = [key_of(self.name, contents, prompt.text, reply) for prompt, reply in pairs]
        known = {key: _from_json(value) for key, value in self.store.get(keys).items()}
        if self.ask_again == "unparsed":
            known = {key: judged for key, judged in known.items() if judged.label != UNPARSED}
        asked = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}  # equal pairs once
        write = self.store.replace if self.ask_again else self.store.put
        names = list(asked)
        for fresh in self._ask(list(asked.values()), rubric):
            there = {names[i]: judged for i, judged in fresh.items()}
            write({key: self._to_json(judged, rubric) for key, judged in there.items()})
            known |= there
        return [known[key] for key in keys]

    def _ask(self, pairs: Sequence[tuple[Prompt, str]], rubric: str) -> Iterator[Mapping[int, Judged]]:
        """Verdicts by index, as they are there: one by one from an LLMJudge, 512 at a time from any other judge."""
        if isinstance(self.judge, LLMJudge):
            for i, judged in self.judge.judge_all([(prompt.text, reply) for prompt, reply in pairs], rubric=rubric):
                yield {i: judged}
            return
        for start in range(0, len(pairs), _AT_ONCE):
            part = pairs[start : start + _AT_ONCE]
            verdicts = self.judge.grade([prompt for prompt, _ in part], [reply for _, reply in part], rubric=rubric)
            if len(verdicts) != len(part):
                raise ValueError(f"judge {self.name!r}: expected {len(part)} verdicts, got {len(verdicts)}")
            yield {
                start + i: Judged(label=verdict.label, said=(verdict.said,) if verdict.said else ()) for i, verdict in enumerate(verdicts)
            }

    def _to_json(self, judged: Judged, rubric: str) -> dict[str, Any]:
        return {"judge": self.name, "rubric": rubric, "label": judged.label, "said": judged.said, "scores": dict(judged.scores)}


def _from_json(value: Mapping[str, Any]) -> Judged:
    return Judged(label=value["label"], said=tuple(value["said"]), scores=tuple(value["scores"].items()))


def key_of(judge: str, rubric: str, question: str, reply: str) -> str:
    """Identity of one grading: the judge's name, the rubric's identity, and both texts."""
    return hashlib.sha256("\x00".join((judge, rubric, question, reply)).encode("utf-8", "surrogatepass")).hexdigest()
