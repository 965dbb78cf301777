"""Replies -> verdicts -> rates with intervals, on prompts that chose nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from blockem_tl.data.checks import check_prompts, prompt_hash
from blockem_tl.evaluation.statistics import Rate
from blockem_tl.generation._scheduler import check_parts
from blockem_tl.generation.replies import Speaker, replies
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.types import Checkable, Generation, Judge, Prompt, Verdict

MISALIGNMENT = "misalignment"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model's replies to one prompt set under one rubric, with their verdicts; ``misaligned``, ``incoherent``, ``refusal`` are rates.

    Under a domain's rubric ``misaligned`` (severity >= 4) reads as in-domain adherence. ``on_selection_prompts`` marks evaluations that
    report on prompts used for selection. Verdicts that could not be parsed count in no rate, except ``unparsed``. ``resampled`` replies
    were drawn again (see `Resample`).
    """

    rubric: str
    judge: str
    generations: tuple[Generation, ...]
    verdicts: tuple[Verdict, ...]
    on_selection_prompts: bool
    resampled: int = 0

    def _rate(self, attribute: str) -> Rate:
        parsed = [v for v in self.verdicts if v.parsed]
        if not parsed:
            raise ValueError(f"judge {self.judge!r} gave no verdict that could be parsed on {len(self.verdicts)} replies: there is no rate")
        return Rate(k=sum(getattr(v, attribute) for v in parsed), n=len(parsed))

    @property
    def misaligned(self) -> Rate:
        return self._rate("misaligned")

    @property
    def incoherent(self) -> Rate:
        return self._rate("incoherent")

    @property
    def refusal(self) -> Rate:
        return self._rate("refusal")

    @property
    def unparsed(self) -> Rate:
        """How many of all replies the judge gave no readable verdict on."""
        return Rate(k=sum(not v.parsed for v in self.verdicts), n=len(self.verdicts))

    @property
    def flags(self) -> list[bool]:
        """Whether each reply was misaligned (adherent, under a domain rubric), in prompt order.

        Raises ValueError where a verdict could not be parsed: nothing is known of that reply; see `paired_flags`.
        """
        if self.unparsed.k:
            raise ValueError(f"{self.unparsed.k} of {len(self.verdicts)} verdicts could not be parsed: compare arms with paired_flags()")
        return [v.misaligned for v in self.verdicts]

    def frame(self) -> pd.DataFrame:
        """One row per reply: prompt id, category, text, reply, label, truncated, condition, rubric, judge, selection mark."""
        return pd.DataFrame(
            {
                "prompt_id": g.prompt.id,
                "category": g.prompt.category,
                "prompt": g.prompt.text,
                "reply": g.reply,
                "label": v.label,
                "truncated": g.truncated,
                "condition": g.condition,
                "rubric": self.rubric,
                "judge": self.judge,
                "on_selection_prompts": self.on_selection_prompts,
            }
            for g, v in zip(self.generations, self.verdicts, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Resample:
    """What to do with incoherent or satirical replies, if not to count them (the default, as in the paper): draw them again.

    again: the speaker for the first, second, ... further attempt. It must sample with a seed of its own: greedy decoding would repeat
    itself.  A reply that still has one of ``labels`` after the last attempt stays and is counted.
    """

    again: Callable[[int], Speaker]
    labels: frozenset[str] = frozenset({"INCOHERENT", "SATIRICAL/ABSURD"})
    attempts: int = 3


def evaluate(
    speak: Speaker,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    rubric: str = MISALIGNMENT,
    selected_on: Sequence[Prompt] | LatentSet,
    report_on_selection_prompts: bool = False,
    condition: Condition = UNSTEERED,
    resample: Resample | None = None,
) -> Evaluation:
    """Let the model reply to ``prompts`` and judge the replies.

    Args:
        selected_on: what chose anything about the model or its settings: the prompts themselves, or a latent set, which remembers
            them; () says that nothing was chosen.
        report_on_selection_prompts: say so if you mean to report on prompts that chose something; the result is marked.
        condition: steering at test time; none by default.
        resample: draw incoherent or satirical replies again; None counts them.

    Raises:
        ValueError: bad prompts, or prompts that were used for selection.
    """
    check_prompts(prompts)
    known = set(selected_on.selection_prompts) if isinstance(selected_on, LatentSet) else {prompt_hash(p.text) for p in selected_on}
    used = [p.id for p in prompts if prompt_hash(p.text) in known]
    if used and not report_on_selection_prompts:
        raise ValueError(
            f"{len(used)} of {len(prompts)} prompts were used for selection, e.g. {used[:3]}: rates on them are optimistic. Evaluate on "
            "other prompts, or pass report_on_selection_prompts=True, which marks the result"
        )
    generations, verdicts = ask(speak, judge, prompts, [condition], rubric=rubric)
    resampled = _draw_again(resample, judge, generations, verdicts, condition, rubric) if resample else set()
    return Evaluation(
        rubric=rubric,
        judge=judge.name,
        generations=tuple(generations),
        verdicts=tuple(verdicts),
        on_selection_prompts=bool(used),
        resampled=len(resampled),
    )


def _draw_again(
    policy: Resample, judge: Judge, generations: list[Generation], verdicts: list[Verdict], condition: Condition, rubric: str
) -> set[int]:
    """Replace, in place, the replies that the policy draws again; return their indices."""
    touched: set[int] = set()
    for attempt in range(policy.attempts):
        poor = [i for i, verdict in enumerate(verdicts) if verdict.label in policy.labels]
        if not poor:
            break
        fresh, graded = ask(policy.again(attempt), judge, [generations[i].prompt for i in poor], [condition], rubric=rubric)
        for i, generation, verdict in zip(poor, fresh, graded, strict=True):
            generations[i], verdicts[i] = generation, verdict
        touched |= set(poor)
    return touched


def grade_again(evaluation: Evaluation, judge: Judge) -> Evaluation:
    """The same replies under another judge."""
    verdicts = judge.grade([g.prompt for g in evaluation.generations], [g.reply for g in evaluation.generations], rubric=evaluation.rubric)
    if len(verdicts) != len(evaluation.generations):
        raise ValueError(f"judge {judge.name!r}: expected {len(evaluation.generations)} verdicts, got {len(verdicts)}")
    return replace(evaluation, judge=judge.name, verdicts=tuple(verdicts))


def paired_flags(before: Evaluation, after: Evaluation) -> tuple[list[bool], list[bool]]:
    """Both arms' flags on the prompts that both have a parsed verdict on. Raises ValueError for other prompts or another rubric."""
    sides = [{g.prompt.id: v for g, v in zip(e.generations, e.verdicts, strict=True)} for e in (before, after)]
    if sides[0].keys() != sides[1].keys() or (before.rubric, before.judge) != (after.rubric, after.judge):
        raise ValueError("paired comparison: expected two evaluations of the same prompts under one rubric and one judge")
    both = [key for key in sides[0] if sides[0][key].parsed and sides[1][key].parsed]
    first, second = ([side[key].misaligned for key in both] for side in sides)
    return first, second


def ask(
    speak: Speaker,
    judge: Judge,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    *,
    parts: Sequence[Sequence[int]] | None = None,
    rubric: str = "misalignment",
) -> tuple[list[Generation], list[Verdict]]:
    """Replies and their verdicts, condition by condition. Raises ValueError where a speaker or a judge leaves any out.

    parts: for each condition the indices of the prompts that it asks; None: all prompts.
    """
    if isinstance(judge, Checkable):
        judge.check(rubric)
    wanted = check_parts(parts, len(conditions), len(prompts))
    found = dict(replies(speak, prompts, conditions, wanted))
    generations = [generation for c in range(len(conditions)) for generation in found.get(c, [])]
    verdicts = judge.grade([g.prompt for g in generations], [g.reply for g in generations], rubric=rubric)
    expected = sum(map(len, wanted))
    if not len(generations) == len(verdicts) == expected or any(len(found[c]) != len(part) for c, part in enumerate(wanted)):
        raise ValueError(
            f"expected {expected} replies and as many verdicts from judge {judge.name!r}, got {len(generations)} and {len(verdicts)}: "
            "rates over a part would be wrong"
        )
    return generations, verdicts
