"""What is certain before every reply is there: bounds on rates and effects, and who can no longer win.

A bound is computed by the very float operations that the complete result is computed by. Division, addition and subtraction round
monotonically, so no bound ever lies on the wrong side of the result, not even in the last bit: shortcuts by these bounds are exact.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from blockem_tl.evaluation.evaluate import ask
from blockem_tl.generation.replies import Speaker
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.types import Counts, Judge, Label, Prompt, Verdict

NEVER = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Between what and what a number lies that is not known yet. ``high`` is minus infinity for what can never qualify."""

    low: float
    high: float

    @staticmethod
    def at(value: float) -> "Span":
        """Of a number that is known."""
        return Span(low=value, high=value)

    def __add__(self, other: "Span") -> "Span":
        return Span(low=self.low + other.low, high=self.high + other.high)


NOTHING = Span(low=NEVER, high=NEVER)


class Tally:
    """The verdicts on one condition so far, by the prompt's index; ``n_prompts`` in the end. ``counts`` are theirs, n may be 0."""

    def __init__(self, condition: Condition, n_prompts: int) -> None:
        self.condition, self.n_prompts = condition, n_prompts
        self.verdicts: dict[int, Verdict] = {}
        self.counts = Counts(n=0, misaligned=0, incoherent=0, refusal=0)

    @property
    def left(self) -> int:
        return self.n_prompts - len(self.verdicts)

    def add(self, prompt: int, verdict: Verdict) -> None:
        """Note a verdict; an unparsed one counts in no rate."""
        self.verdicts[prompt] = verdict
        if verdict.parsed:
            self.counts = _more(self.counts, verdict, 1)

    def rest(self, label: Label) -> Counts:
        """The counts if every missing reply were labelled so. Complete: the counts.

        An unparsed verdict counts in no rate. Still "5" for all the rest gives the largest possible misaligned rate and "1" the smallest
        possible misaligned and incoherent rates: leaving a reply out of m / n never moves the rate further than such a label does.

        Raises ValueError where all replies are there and none could be parsed: there is no rate.
        """
        counts = _more(self.counts, Verdict(label=label), self.left)
        return counts if counts.n else Counts.of(list(self.verdicts.values()))

    def span(self, effect: Callable[[Counts], float]) -> Span:
        """Between what ``effect`` lies, which must rise or fall with the misaligned rate and depend on nothing else."""
        one, other = effect(self.rest("1")), effect(self.rest("5"))
        return Span(low=min(one, other), high=max(one, other))

    def missing(self, order: Iterable[int]) -> list[int]:
        """The prompts that have not been asked, in ``order``."""
        return [i for i in order if i not in self.verdicts]


def _more(counts: Counts, verdict: Verdict, n: int) -> Counts:
    return Counts(
        n=counts.n + n,
        misaligned=counts.misaligned + n * verdict.misaligned,
        incoherent=counts.incoherent + n * verdict.incoherent,
        refusal=counts.refusal + n * verdict.refusal,
    )


def beaten(spans: Sequence[Span], keep: int) -> list[bool]:
    """Which entries can no longer be among the best ``keep``. Ties go to the earlier entry, as in a stable sort of the complete results."""
    floor = sorted(((span.low, -i) for i, span in enumerate(spans)), reverse=True)[keep - 1 : keep]
    return [bool(floor) and floor[0] > (span.high, -i) for i, span in enumerate(spans)]


class Arm:
    """Base steered to be worse ("induce") or tuned steered to be better ("repair"): asks any condition on any part of the prompts.

    It asks the unsteered replies at once, and remembers every tally: what one stage has asked, the next need not ask again. What it
    learns of each prompt orders later questions; that changes no result, only when it is certain.
    """

    def __init__(self, name: Literal["induce", "repair"], speak: Speaker, judge: Judge, prompts: Sequence[Prompt]) -> None:
        self.name, self.speak, self.judge, self.prompts = name, speak, judge, prompts
        self.judged, self.misaligned, self.incoherent = (np.zeros(len(prompts)) for _ in range(3))
        self.tallies: dict[str, Tally] = {}
        tally = self.tally(UNSTEERED)
        self.ask([(tally, range(len(prompts)))])
        self.unsteered = tally.rest("1")
        self.anything = Tally(UNSTEERED, len(prompts)).span(self.effect)  # between what the effect of any condition lies

    def tally(self, condition: Condition) -> Tally:
        """The tally of a condition with these contents: what is known of it, or empty."""
        return self.tallies.setdefault(condition.fingerprint, Tally(condition, len(self.prompts)))

    def effect(self, counts: Counts) -> float:
        """How much worse base got, or how much better tuned (the brackets of eq. 7 and 9)."""
        before, after = self.unsteered.misaligned_rate, counts.misaligned_rate
        return after - before if self.name == "induce" else before - after

    def futility(self) -> Float[np.ndarray, " n_prompts"]:
        """For each prompt how often its reply so far did not do what this arm is after: base stayed aligned, or tuned misaligned."""
        rate = self.misaligned / np.maximum(self.judged, 1)
        return 1 - rate if self.name == "induce" else rate

    def ask(self, wanted: Iterable[tuple[Tally, Sequence[int]]]) -> int:
        """Ask each condition on its part of the prompts, and put the verdicts into the tallies; return how many replies that took."""
        asked = [(tally, list(part)) for tally, part in wanted if part]
        if not asked:
            return 0
        _, verdicts = ask(self.speak, self.judge, self.prompts, [tally.condition for tally, _ in asked], parts=[part for _, part in asked])
        for (tally, i), verdict in zip(((tally, i) for tally, part in asked for i in part), verdicts, strict=True):
            tally.add(i, verdict)
            self.judged[i] += verdict.parsed
            self.misaligned[i] += verdict.misaligned
            self.incoherent[i] += verdict.incoherent
        return len(verdicts)


@dataclass(frozen=True, kw_only=True)
class Arms:
    """Both arms of stages 2 and 3, on the same prompts under the same judge; made by `both_arms`."""

    induce: Arm
    repair: Arm


def both_arms(base: Speaker, tuned: Speaker, judge: Judge, prompts: Sequence[Prompt]) -> Arms:
    """What stages 2 and 3 ask: base and tuned (who reply), the judge, and the core prompts. Asks the unsteered replies."""
    return Arms(induce=Arm("induce", base, judge, prompts), repair=Arm("repair", tuned, judge, prompts))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of one condition: ``counts`` of the ``asked`` replies; complete where that is all ``of`` them."""

    arm: str
    dose: float
    counts: Counts
    asked: int
    of: int


class Bar:
    """Progress in replies, of all that the full grid would ask: also those are done that need not be asked any more."""

    def __init__(self, what: str, total: int, progress: bool) -> None:
        self.bar = tqdm(total=total, desc=what, unit="reply", disable=not progress)
        self.asked = 0

    def update(self, *, asked: int, open: int, abandoned: int | None = None) -> None:
        """Note ``asked`` more replies; ``open`` may still have to be asked."""
        self.asked += asked
        done = int(self.bar.total) - open
        notes = {"asked": self.asked, "saved": done - self.asked} | ({} if abandoned is None else {"abandoned": abandoned})
        self.bar.set_postfix(notes, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Leave the finished bar."""
        self.bar.close()
