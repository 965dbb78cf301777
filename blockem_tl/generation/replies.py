"""`Replies`: generated replies as a sequence that shows itself, is graded, and gives rates with intervals."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import pandas as pd

from blockem_tl.types import (
    INCOHERENT_LABELS,
    POSITIVE_LABELS,
    UNPARSED,
    Checkable,
    Generation,
    Judge,
    Rate,
    Verdict,
    check_judge,
    check_verdicts,
)
from blockem_tl.views.results import Result
from blockem_tl.views.tables import RateFrame

MISALIGNMENT = "misalignment"
"""The rubric of harm; any other rubric is a training domain's, under which severity 4 and 5 mean adherence."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Replies(Result, Sequence[Generation]):
    """Replies in order, condition by condition and prompt by prompt.

    columns: further columns of the frame, one value per reply: the site that was patched, how many steps were.
    verdicts, judge, rubric: after `grade`; None and empty before.
    """

    generations: tuple[Generation, ...]
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] | None = None
    judge: str = ""
    rubric: str = ""

    @staticmethod
    def of(generations: Iterable[Generation], **columns: Sequence[Any]) -> "Replies":
        """Replies that have not been graded. Raises ValueError for a column of another length."""
        found = tuple(generations)
        wrong = [name for name, values in columns.items() if len(values) != len(found)]
        if wrong:
            raise ValueError(f"replies: expected {len(found)} values in each column, got others in {wrong}")
        return Replies(generations=found, columns={name: tuple(values) for name, values in columns.items()})

    @overload
    def __getitem__(self, index: int) -> Generation: ...
    @overload
    def __getitem__(self, index: slice) -> "Replies": ...
    def __getitem__(self, index: int | slice) -> "Generation | Replies":
        if isinstance(index, int):
            return self.generations[index]
        return replace(
            self,
            generations=self.generations[index],
            columns={name: values[index] for name, values in self.columns.items()},
            verdicts=None if self.verdicts is None else self.verdicts[index],
        )

    def __len__(self) -> int:
        return len(self.generations)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Replies, list, tuple)) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType] - as of a list
    _most_rows = 10

    def where(self, **values: Any) -> "Replies":
        """The replies with these values in the frame's columns: ``replies.where(condition="unsteered")``.

        Raises:
            ValueError: an unknown column.
        """
        frame = self.to_frame()
        unknown = sorted(set(values) - set(frame.columns))
        if unknown:
            raise ValueError(f"replies: expected columns among {list(frame.columns)}, got {unknown}")
        chosen = [i for i in range(len(self)) if all(frame[name].iloc[i] == value for name, value in values.items())]
        return replace(
            self,
            generations=tuple(self.generations[i] for i in chosen),
            columns={name: tuple(column[i] for i in chosen) for name, column in self.columns.items()},
            verdicts=None if self.verdicts is None else tuple(self.verdicts[i] for i in chosen),
        )

    # -------------------------------------------------------------------------------------------- grading

    def grade(self, judge: Judge, *, rubric: str = MISALIGNMENT) -> "Replies":
        """The same replies with their verdicts. Raises ValueError if the judge leaves any out, or what the judge raises."""
        check_judge(judge)
        if isinstance(judge, Checkable):
            judge.check(rubric)
        verdicts = tuple(judge.grade([g.prompt for g in self], [g.reply for g in self], rubric=rubric))
        check_verdicts(judge, verdicts, len(self))
        graded = replace(self, verdicts=verdicts, judge=judge.name, rubric=rubric)
        _warn_if_nothing_to_lower(graded)
        return graded

    def rates(self, by: str | Sequence[str] = "condition") -> pd.DataFrame:
        """One row per group of replies: n, and each rate as a fraction with its 95 % Wilson interval (``_low``, ``_high``).

        Printed, the frame shows a rate and its interval in one column.

        Rates are "misaligned" (under a domain's rubric "adherent"), "incoherent", "refusal" and "unparsed". Replies without a readable
        verdict count in "unparsed" alone.

        Args:
            by: a column of `to_frame`, or several; [] for one row over all replies.

        Raises:
            ValueError: replies that have not been graded, or an unknown column.
        """
        if self.verdicts is None:
            raise ValueError("rates: expected graded replies, got none: call replies.grade(judge) first")
        keys = [by] if isinstance(by, str) else list(by)
        frame = self.to_frame()
        unknown = [key for key in keys if key not in frame.columns]
        if unknown:
            raise ValueError(f"rates: expected columns among {list(frame.columns)}, got {unknown}")
        groups: dict[tuple[Any, ...], list[Verdict]] = {}
        for key, verdict in zip(frame[keys].itertuples(index=False, name=None) if keys else [()] * len(self), self.verdicts, strict=True):
            groups.setdefault(key, []).append(verdict)
        return RateFrame([{**dict(zip(keys, key, strict=True)), **rates_of(verdicts, self.rubric)} for key, verdicts in groups.items()])

    # -------------------------------------------------------------------------------------------- showing

    def to_frame(self) -> pd.DataFrame:
        """One row per reply: prompt_id, category, condition, prompt, reply, truncated, and the further columns.

        Once graded also label and, from a judge with words of its own, said.
        """
        rows: dict[str, Any] = {
            "prompt_id": [g.prompt.id for g in self],
            "category": [g.prompt.category for g in self],
            "condition": [g.condition for g in self],
            **{name: _column(values) for name, values in self.columns.items()},
            "prompt": [g.prompt.text for g in self],
            "reply": [g.reply for g in self],
            "truncated": [g.truncated for g in self],
        }
        if self.verdicts is not None:
            rows["label"] = [v.label for v in self.verdicts]
            rows |= {"said": [v.said for v in self.verdicts]} if any(v.said for v in self.verdicts) else {}
        return pd.DataFrame(rows)

    def _shown(self) -> pd.DataFrame:
        """What differs between the replies, the verdicts first; once graded, and of several groups, their rates instead."""
        if self.verdicts and len(groups := self.rates(self._groups())) > 1:
            return groups.short()
        return verdicts_first(self.to_frame(), self.columns)

    def _groups(self) -> list[str]:
        """The columns that tell the groups of replies apart: those of a sweep, else the condition."""
        return [name for name in ("patched", "site") if name in self.columns] or ["condition"]

    def headline(self) -> str:
        """The numbers of replies, conditions and prompts and, once graded and of one condition, the rate."""
        n_conditions, n_prompts = len({g.condition for g in self}), len({g.prompt.id for g in self})
        cut = sum(g.truncated for g in self)
        text = f"{len(self)} replies: {n_conditions} conditions, {n_prompts} prompts" + (f", {cut} cut at the limit" if cut else "")
        if self.verdicts is None:
            return text
        if n_conditions > 1:  # one rate over all of them would mean nothing
            return f"{text}; graded by {self.judge}: see rates()"
        readable = [v for v in self.verdicts if v.parsed]
        rate = Rate(k=sum(v.positive for v in readable), n=len(readable)) if readable else "nothing readable"
        return f"{text}; {self.judge}, {positive_name(self.rubric)}: {rate}"

    def plot(self, by: str | None = None) -> Any:
        """A bar per group for misalignment (or adherence) and incoherence, with intervals; a patching sweep is drawn along the blocks.

        Args:
            by: a column of `to_frame`; None: the site of a sweep, else the condition.

        Raises:
            ValueError: replies that have not been graded, or an unknown column.
            TypeError: several columns: a plot has one axis.
        """
        from blockem_tl.views import plots  # matplotlib is slow to import

        if by is not None and not isinstance(by, str):
            raise TypeError(f"plot: expected one column to draw along, got {by!r}; rates(by=[...]) makes the table over several")
        by = by or ("site" if "site" in self.columns else "condition")
        keys = self._groups() if by == "site" else [by]
        return plots.rates(self.rates(keys), by=by, direction=" and ".join(dict.fromkeys(self.columns.get("direction", ()))))


def _warn_if_nothing_to_lower(graded: Replies) -> None:
    """Warn of a patching sweep into a tuned model of whose unpatched replies none is misaligned."""
    patched, into = graded.columns.get("patched", ()), graded.columns.get("direction", ("",))
    own = [v for v, kind in zip(graded.verdicts or (), patched, strict=False) if kind == "unpatched" and v.parsed]
    if own and not any(v.positive for v in own) and not into[0].endswith(" into base"):
        warnings.warn(
            f"patching ({into[0]}): 0 % of the {len(own)} unpatched replies are {positive_name(graded.rubric)}, so no patch can lower it. "
            "Take an adapter or a checkpoint that misbehaves on these prompts (evaluate says), longer replies, or more prompts",
            stacklevel=3,
        )


def verdicts_first(frame: pd.DataFrame, columns: Iterable[str] = ()) -> pd.DataFrame:
    """A frame of replies for people: the label, then those columns that vary, then the reply."""
    order = [name for name in ("label", *columns, "condition", "category", "prompt_id", "prompt", "reply") if name in frame]
    kept = [name for name in order if name in ("label", "prompt_id", "reply") or frame[name].nunique(dropna=False) > 1]
    return pd.DataFrame(frame[kept])


def _column(values: tuple[Any, ...]) -> Any:
    """The values as a column; where some are None, they stay so: pandas would make them NaN, which equals nothing."""
    return pd.Series(values, dtype=object) if None in values else list(values)


def positive_name(rubric: str) -> str:
    """The word for severity 4 and 5: "misaligned", and "adherent" under a training domain's rubric."""
    return "misaligned" if rubric == MISALIGNMENT else "adherent"


def rates_of(verdicts: Sequence[Verdict], rubric: str) -> dict[str, Any]:
    """n and each rate with its interval, as one row; rates are NaN if no verdict could be read."""
    return rates_of_labels(Counter(verdict.label for verdict in verdicts), rubric)


def rates_of_labels(counts: Mapping[str, int], rubric: str) -> dict[str, Any]:
    """As `rates_of`, from how often each label was given, which is what `judge_file` returns."""
    n = sum(counts.values()) - counts.get(UNPARSED, 0)
    row: dict[str, Any] = {"n": n}
    for name, labels in ((positive_name(rubric), POSITIVE_LABELS), ("incoherent", INCOHERENT_LABELS), ("refusal", {"REFUSAL"})):
        rate = Rate(k=sum(counts.get(label, 0) for label in labels), n=n) if n else None
        low, high = rate.interval if rate else (float("nan"), float("nan"))
        row |= {name: rate.value if rate else float("nan"), f"{name}_low": low, f"{name}_high": high}
    return {**row, "unparsed": counts.get(UNPARSED, 0) / sum(counts.values())}
