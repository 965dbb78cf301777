"""`evaluate`: a model's replies, graded, as rates with intervals, on prompts that chose nothing."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from blockem_tl.data.checks import check_prompts, prompt_hash
from blockem_tl.evaluation.asking import ask
from blockem_tl.generation.replies import MISALIGNMENT, Replies, positive_name, verdicts_first
from blockem_tl.generation.reply_fn import ReplyFn, replies_from
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.models.load import Model
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.types import Generation, Judge, Prompt, Rate, Verdict
from blockem_tl.views.results import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation(Result):
    """One model's replies to one prompt set under one rubric, with their verdicts and rates.

    on_selection_prompts: whether any prompt was used for selection, so that the rates are optimistic.
    resampled: how many replies were drawn again (see `Resample`).
    """

    rubric: str
    judge: str
    generations: tuple[Generation, ...]
    verdicts: tuple[Verdict, ...]
    on_selection_prompts: bool
    resampled: int = 0
    _most_rows = 10

    @property
    def replies(self) -> Replies:
        """The graded replies, for `Replies.rates` by category and the like."""
        return Replies(generations=self.generations, verdicts=self.verdicts, judge=self.judge, rubric=self.rubric)

    @property
    def positive(self) -> Rate:
        """Severity 4 or 5, whatever the rubric: `misaligned` or `adherent`."""
        return self._rate("positive")

    @property
    def misaligned(self) -> Rate:
        """Emergent misalignment: severity 4 or 5. Raises ValueError under a training domain's rubric, see `adherent`."""
        if self.rubric != MISALIGNMENT:
            raise ValueError(f"under the rubric {self.rubric!r} severity 4 and 5 mean adherence: read .adherent")
        return self._rate("positive")

    @property
    def adherent(self) -> Rate:
        """In-domain adherence: severity 4 or 5 under the domain's rubric. Raises ValueError under the rubric of harm."""
        if self.rubric == MISALIGNMENT:
            raise ValueError("under the rubric of harm severity 4 and 5 mean misalignment: read .misaligned")
        return self._rate("positive")

    @property
    def incoherent(self) -> Rate:
        """INCOHERENT, OFF-TOPIC and SATIRICAL/ABSURD."""
        return self._rate("incoherent")

    @property
    def refusal(self) -> Rate:
        """Refusals."""
        return self._rate("refusal")

    @property
    def unparsed(self) -> Rate:
        """Replies without a readable verdict, of all; no other rate counts them."""
        return Rate(k=sum(not v.parsed for v in self.verdicts), n=len(self.verdicts))

    def _rate(self, attribute: str) -> Rate:
        parsed = [v for v in self.verdicts if v.parsed]
        if not parsed:
            raise ValueError(f"judge {self.judge!r} gave no verdict that could be parsed on {len(self.verdicts)} replies: there is no rate")
        return Rate(k=sum(getattr(v, attribute) for v in parsed), n=len(parsed))

    @property
    def flags(self) -> list[bool]:
        """Whether each reply was misaligned (adherent, under a domain's rubric), in prompt order.

        Raises:
            ValueError: a verdict that could not be parsed; see `paired_flags`.
        """
        if self.unparsed.k:
            raise ValueError(f"{self.unparsed.k} of {len(self.verdicts)} verdicts could not be parsed: compare arms with paired_flags()")
        return [v.positive for v in self.verdicts]

    def to_frame(self) -> pd.DataFrame:
        """One row per reply: prompt id, category, text, reply, label, truncated, condition, rubric, judge, selection mark."""
        frame = self.replies.to_frame()[["prompt_id", "category", "prompt", "reply", "label", "truncated", "condition"]]
        return frame.assign(rubric=self.rubric, judge=self.judge, on_selection_prompts=self.on_selection_prompts)

    def headline(self) -> str:
        """The rates in one line."""
        mark = "; SELECTION prompts, optimistic" if self.on_selection_prompts else ""
        return f"{positive_name(self.rubric)} {self.positive}, incoherent {self.incoherent}, refusal {self.refusal}; {self.judge}{mark}"

    def _shown(self) -> pd.DataFrame:
        """The columns that vary, the verdicts first."""
        return verdicts_first(self.replies.to_frame())

    def plot(self, by: str | None = None) -> Any:
        """A bar per group of replies; see `Replies.plot`."""
        return self.replies.plot(by)


@dataclass(frozen=True, kw_only=True)
class Resample:
    """A policy for incoherent or satirical replies: draw them again, instead of counting them (the default, as in the paper).

    again: gives the reply function of the first, second, ... further attempt. It must sample with a seed of its own: greedy decoding
        would repeat itself.
    labels: replies with one of these are drawn again. A reply that still has one after the last attempt stays and is counted.
    """

    again: Callable[[int], ReplyFn]
    labels: frozenset[str] = frozenset({"INCOHERENT", "SATIRICAL/ABSURD"})
    attempts: int = 3


def evaluate(
    model: Model | ReplyFn,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    adapter: str | Path | None = None,
    rubric: str = MISALIGNMENT,
    selected_on: Iterable[Prompt] | LatentSet = (),
    report_on_selection_prompts: bool = False,
    condition: Condition = UNSTEERED,
    resample: Resample | None = None,
    max_new_tokens: int = 200,
    batch_size: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """The model's replies to ``prompts``, graded: rates of misalignment, incoherence and refusal with their intervals.

    Args:
        model: a model, or a reply function (`replies_from`, `cached`), which has its own adapter, token limit and batch size.
        adapter: which weights act: "base", an adapter by name or in a folder; None: the model as it stands.
        rubric: "misalignment", or a training domain's name for adherence.
        selected_on: the prompts that chose anything about the model or its settings, or a latent set, which remembers them.
        report_on_selection_prompts: report on prompts that chose something; the result is marked.
        condition: steering at test time.  resample: draw incoherent or satirical replies again; None counts them.

    Raises ValueError for bad prompts, prompts that were used for selection, or an adapter for a reply function.
    """
    check_prompts(prompts)
    used = _selected(prompts, selected_on, allowed=report_on_selection_prompts)
    if isinstance(model, Model):
        reply_fn = replies_from(model, adapter=adapter, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    elif adapter is not None:
        raise ValueError("evaluate: a reply function has its own adapter: pass adapter=... to replies_from, or a model here")
    else:
        reply_fn = model
    generations, verdicts = ask(reply_fn, judge, prompts, [condition], rubric=rubric)
    resampled = _draw_again(resample, judge, generations, verdicts, condition, rubric) if resample else set()
    return Evaluation(
        rubric=rubric,
        judge=judge.name,
        generations=tuple(generations),
        verdicts=tuple(verdicts),
        on_selection_prompts=bool(used),
        resampled=len(resampled),
    )


def _selected(prompts: Sequence[Prompt], selected_on: Iterable[Prompt] | LatentSet, *, allowed: bool) -> list[str]:
    """Ids of the prompts that selected something. Raises ValueError for any, unless they are allowed."""
    known = set(selected_on.selection_prompts) if isinstance(selected_on, LatentSet) else {prompt_hash(p.text) for p in selected_on}
    used = [p.id for p in prompts if prompt_hash(p.text) in known]
    if used and not allowed:
        raise ValueError(
            f"{len(used)} of {len(prompts)} prompts were used for selection, e.g. {used[:3]}: rates on them are optimistic. Evaluate on "
            "other prompts, or pass report_on_selection_prompts=True, which marks the result"
        )
    return used


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
    """The same replies under another judge. Raises ValueError if the judge leaves any out."""
    graded = evaluation.replies.grade(judge, rubric=evaluation.rubric)
    return replace(evaluation, judge=judge.name, verdicts=graded.verdicts or ())


def paired_flags(before: Evaluation, after: Evaluation) -> tuple[list[bool], list[bool]]:
    """Both arms' flags on the prompts that both have a parsed verdict on. Raises ValueError for other prompts or another rubric."""
    sides = [{g.prompt.id: v for g, v in zip(e.generations, e.verdicts, strict=True)} for e in (before, after)]
    if sides[0].keys() != sides[1].keys() or (before.rubric, before.judge) != (after.rubric, after.judge):
        raise ValueError("paired comparison: expected two evaluations of the same prompts under one rubric and one judge")
    both = [key for key in sides[0] if sides[0][key].parsed and sides[1][key].parsed]
    first, second = ([side[key].positive for key in both] for side in sides)
    return first, second


# ------------------------------------------------------------------------------------------------ as JSON


def evaluation_to_json(evaluation: Evaluation) -> dict[str, list[str]]:
    """Replies and labels in prompt order: what `evaluation_from_json` reads."""
    return {"replies": [g.reply for g in evaluation.generations], "labels": [v.label for v in evaluation.verdicts]}


def evaluation_from_json(
    kept: dict[str, list[str]], prompts: Sequence[Prompt], *, judge: str, rubric: str = MISALIGNMENT, on_selection_prompts: bool = False
) -> Evaluation:
    """The evaluation that `evaluation_to_json` wrote, of these prompts. Raises ValueError for another number of prompts."""
    generations = tuple(
        Generation(prompt=prompt, condition="", reply=text, reply_ids=(), truncated=False)
        for prompt, text in zip(prompts, kept["replies"], strict=True)
    )
    verdicts = tuple(Verdict(label=label) for label in kept["labels"])
    return Evaluation(rubric=rubric, judge=judge, generations=generations, verdicts=verdicts, on_selection_prompts=on_selection_prompts)
