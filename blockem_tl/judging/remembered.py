"""Any judge, with its verdicts kept: what was graded once is not graded again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockem_tl.judging.judge import LLMJudge
from blockem_tl.judging.store import Judged, VerdictStore, key_of
from blockem_tl.types import Checkable, Judge, Prompt, Verdict

_CHUNK = 512  # replies graded between one writing to disk and the next


@dataclass(frozen=True, kw_only=True, eq=False)
class RememberedJudge:
    """A judge with a store: equal (question, reply) pairs are asked once, and never again.

    Verdicts are kept under the judge's name and the rubric's. A judge whose grading changes must change its name, or have a method
    ``fingerprint(rubric)`` that says by which rubric it grades.
    """

    judge: Judge
    store: VerdictStore

    @property
    def name(self) -> str:
        return self.judge.name

    def check(self, rubric: str = "misalignment") -> None:
        """See `Checkable`."""
        if isinstance(self.judge, Checkable):
            self.judge.check(rubric)

    def grade(self, prompts: Sequence[Prompt], replies: Sequence[str], *, rubric: str = "misalignment") -> list[Verdict]:
        """One verdict per (prompt, reply), in order; the judge is asked for those that are missing. Raises what the judge raises."""
        if len(prompts) != len(replies):
            return self.judge.grade(prompts, replies, rubric=rubric)  # which knows how to say that this is wrong
        fingerprint = getattr(self.judge, "fingerprint", None)
        contents = f"{rubric}\0{fingerprint(rubric)}" if callable(fingerprint) else rubric
        keys = [key_of(self.name, contents, prompt.text, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        known = {key: judged.label for key, judged in self.store.get(keys).items()}
        asked = {key: i for i, key in enumerate(keys) if key not in known}
        for start in range(0, len(asked), _CHUNK):
            part = dict(list(asked.items())[start : start + _CHUNK])
            verdicts = self.judge.grade([prompts[i] for i in part.values()], [replies[i] for i in part.values()], rubric=rubric)
            if len(verdicts) != len(part):
                raise ValueError(f"judge {self.name!r}: expected {len(part)} verdicts, got {len(verdicts)}")
            fresh = {key: Judged(label=verdict.label) for key, verdict in zip(part, verdicts, strict=True)}
            self.store.put_all(fresh, judge=self.name, rubric=rubric)
            known |= {key: judged.label for key, judged in fresh.items()}
        return [Verdict(label=known[key]) for key in keys]


def remembered(judge: Judge, store: VerdictStore) -> Judge:
    """``judge`` with its verdicts in ``store``. An `LLMJudge` keeps each verdict as it comes, in its own store if it has one."""
    if isinstance(judge, LLMJudge):
        return judge if judge.store is not None else replace(judge, store=store)
    return RememberedJudge(judge=judge, store=store)
