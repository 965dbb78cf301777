"""Stopping early, exactly: bounds on rates from part of the replies, and the steering tests that are asked until a winner is certain.

A bound is computed by the very float operations that the complete result is computed by. Division, addition and subtraction round
monotonically, so no bound ever lies on the wrong side of the result, not even in the last bit: shortcuts by these bounds are exact.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from blockem_tl.evaluation.asking import ask
from blockem_tl.generation.reply_fn import ReplyFn
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.types import Counts, Judge, Label, Prompt, Verdict
from blockem_tl.views.progress import progress_bar

MINUS_INFINITY = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The least and the greatest value that a number can still have. ``high`` is minus infinity for what can never qualify."""

    low: float
    high: float

    @staticmethod
    def at(value: float) -> "Bounds":
        """Bounds of a number that is known."""
        return Bounds(low=value, high=value)

    def __add__(self, other: "Bounds") -> "Bounds":
        return Bounds(low=self.low + other.low, high=self.high + other.high)


INELIGIBLE = Bounds(low=MINUS_INFINITY, high=MINUS_INFINITY)


class Tally:
    """The verdicts on one condition so far, by prompt index, and their counts (n may be 0)."""

    def __init__(self, condition: Condition, n_prompts: int) -> None:
        self.condition, self.n_prompts = condition, n_prompts
        self.verdicts: dict[int, Verdict] = {}
        self.counts = Counts(n=0, misaligned=0, incoherent=0, refusal=0)

    @property
    def left(self) -> int:
        """Number of prompts not asked yet."""
        return self.n_prompts - len(self.verdicts)

    def add(self, prompt: int, verdict: Verdict) -> None:
        """Note a verdict; an unparsed one counts in no rate."""
        self.verdicts[prompt] = verdict
        if verdict.parsed:
            self.counts = _more(self.counts, verdict, 1)

    def if_rest(self, label: Label) -> Counts:
        """The counts if every missing reply were labelled so; the counts themselves once all are there.

        "5" for the rest gives the largest possible misaligned rate, "1" the smallest possible misaligned and incoherent rates. That holds
        although an unparsed verdict counts in no rate: leaving a reply out of m / n never moves the rate further than such a label does.

        Raises:
            ValueError: all replies are there and none could be parsed, so that there is no rate.
        """
        counts = _more(self.counts, Verdict(label=label), self.left)
        return counts if counts.n else Counts.of(list(self.verdicts.values()))

    def bounds(self, effect: Callable[[Counts], float]) -> Bounds:
        """Bounds on ``effect``, which must rise or fall with the misaligned rate and depend on nothing else."""
        one, other = effect(self.if_rest("1")), effect(self.if_rest("5"))
        return Bounds(low=min(one, other), high=max(one, other))

    def missing(self, order: Iterable[int]) -> list[int]:
        """The prompts that have not been asked, in ``order``."""
        return [i for i in order if i not in self.verdicts]


def _more(counts: Counts, verdict: Verdict, n: int) -> Counts:
    return Counts(
        n=counts.n + n,
        misaligned=counts.misaligned + n * verdict.positive,
        incoherent=counts.incoherent + n * verdict.incoherent,
        refusal=counts.refusal + n * verdict.refusal,
    )


def beaten(bounds: Sequence[Bounds], n_best: int) -> list[bool]:
    """For each entry, whether it can no longer be among the ``n_best``. Ties go to the earlier entry, as in a stable sort."""
    floor = sorted(((of.low, -i) for i, of in enumerate(bounds)), reverse=True)[n_best - 1 : n_best]
    return [bool(floor) and floor[0] > (of.high, -i) for i, of in enumerate(bounds)]


class SteeringTest:
    """Base steered to be worse ("induce") or tuned steered to be better ("repair"): asks any condition on any part of the prompts.

    It asks the unsteered replies at once, and remembers every tally: what one stage has asked, the next need not ask again. What it
    learns of each prompt orders later questions; that changes no result, only when it is certain.
    """

    def __init__(
        self, name: Literal["induce", "repair"], reply_fn: ReplyFn, judge: Judge, prompts: Sequence[Prompt], smallest_wave: int = 1
    ) -> None:
        self.name, self.reply_fn, self.judge, self.prompts, self.smallest_wave = name, reply_fn, judge, prompts, smallest_wave
        self.judged, self.misaligned, self.incoherent = (np.zeros(len(prompts)) for _ in range(3))
        self.tallies: dict[str, Tally] = {}
        tally = self.tally(UNSTEERED)
        self.ask([(tally, range(len(prompts)))])
        self.unsteered = tally.if_rest("1")
        self.any_effect = Tally(UNSTEERED, len(prompts)).bounds(self.effect)  # of any condition

    def tally(self, condition: Condition) -> Tally:
        """The tally of a condition with these contents: what is known of it, or empty."""
        return self.tallies.setdefault(condition.fingerprint, Tally(condition, len(self.prompts)))

    def effect(self, counts: Counts) -> float:
        """The effect: by how much base got worse, or tuned better (the brackets of eq. 7 and 9)."""
        before, after = self.unsteered.misaligned_rate, counts.misaligned_rate
        return after - before if self.name == "induce" else before - after

    def futility(self) -> Float[np.ndarray, " n_prompts"]:
        """For each prompt the share of its replies so far that were no success: base stayed aligned, or tuned misaligned."""
        rate = self.misaligned / np.maximum(self.judged, 1)
        return 1 - rate if self.name == "induce" else rate

    def enlarged(self, sizes: Sequence[int]) -> list[int]:
        """The sizes of a wave's parts, all of them larger in proportion if together they are fewer than the smallest wave."""
        factor = max(1.0, self.smallest_wave / max(1, sum(sizes)))
        return [math.ceil(size * factor) for size in sizes]

    def ask(self, wanted: Iterable[tuple[Tally, Sequence[int]]]) -> int:
        """Ask each condition on its part of the prompts, and put the verdicts into the tallies; return how many replies that took."""
        asked = [(tally, list(part)) for tally, part in wanted if part]
        if not asked:
            return 0
        conditions, parts = [tally.condition for tally, _ in asked], [part for _, part in asked]
        _, verdicts = ask(self.reply_fn, self.judge, self.prompts, conditions, prompt_indices=parts)
        for (tally, i), verdict in zip(((tally, i) for tally, part in asked for i in part), verdicts, strict=True):
            tally.add(i, verdict)
            self.judged[i] += verdict.parsed
            self.misaligned[i] += verdict.positive
            self.incoherent[i] += verdict.incoherent
        return len(verdicts)


@dataclass(frozen=True, kw_only=True)
class SteeringTests:
    """Both tests of stages 2 and 3, on the same prompts under the same judge; made by `steering_tests`."""

    induce: SteeringTest
    repair: SteeringTest


def steering_tests(base: ReplyFn, tuned: ReplyFn, judge: Judge, prompts: Sequence[Prompt], *, smallest_wave: int = 1) -> SteeringTests:
    """The tests that stages 2 and 3 ask: base induced, tuned repaired, on the core prompts. Asks the unsteered replies.

    smallest_wave: replies that are asked at a time at least, as long as so many are undecided.
    """
    induce = SteeringTest("induce", base, judge, prompts, smallest_wave)
    return SteeringTests(induce=induce, repair=SteeringTest("repair", tuned, judge, prompts, smallest_wave))


@dataclass(frozen=True, kw_only=True)
class DoseCounts:
    """Counts at one dose of one test, of the ``asked`` replies; complete if these are all ``of`` them."""

    test: str
    dose: float
    counts: Counts
    asked: int
    of: int


class ReplyProgress:
    """Progress in replies, of all that the full grid would ask: replies that need not be asked any more are done too."""

    def __init__(self, what: str, total: int, progress: bool) -> None:
        self.bar = progress_bar(total=total, desc=what, unit="reply", show=progress)
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
