"""Several evaluations in one table: of several judges on the same replies, or of several models on the same prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd

from blockem_tl.evaluation.evaluate import Evaluation, evaluate, grade_again, paired_flags
from blockem_tl.evaluation.statistics import Estimate, agreement, average_rate, paired_difference
from blockem_tl.generation.replies import MISALIGNMENT, positive_name, rates_of
from blockem_tl.generation.reply_fn import ReplyFn
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.judging.rubrics import find_rubric
from blockem_tl.models.load import Model
from blockem_tl.types import Checkable, Judge, Prompt
from blockem_tl.views.results import Result
from blockem_tl.views.tables import RateFrame

RATES = ("positive", "incoherent", "refusal")


@dataclass(frozen=True, kw_only=True, repr=False)
class Panel(Result):
    """One evaluation per judge, of the same replies."""

    evaluations: tuple[Evaluation, ...]

    def __post_init__(self) -> None:
        names = [e.judge for e in self.evaluations]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"panel: expected judges with different names, got {names}")
        if len({(e.rubric, tuple(g.reply for g in e.generations)) for e in self.evaluations}) > 1:
            raise ValueError("panel: expected every judge to have graded the same replies under the same rubric")

    def average(self, rate: str = "positive") -> Estimate:
        """A rate averaged over the judges (paper B.3)."""
        return average_rate([getattr(e, rate) for e in self.evaluations])

    def agreements(self) -> dict[tuple[str, str], dict[str, Estimate]]:
        """Cohen's kappa of every two judges: on the labels, and on severity 4 or 5 or not, over replies that both could grade."""
        found = {}
        for one, other in combinations(self.evaluations, 2):
            both = [(a, b) for a, b in zip(one.verdicts, other.verdicts, strict=True) if a.parsed and b.parsed]
            found[one.judge, other.judge] = {
                "labels": agreement([a.label for a, _ in both], [b.label for _, b in both]),
                "positive": agreement([str(a.positive) for a, _ in both], [str(b.positive) for _, b in both]),
            }
        return found

    def disagreements(self) -> pd.DataFrame:
        """The replies on which judges differ about misalignment, incoherence or refusal, or one of them gave no verdict."""
        frame = self.evaluations[0].to_frame().drop(columns=["label", "judge"])
        for e in self.evaluations:
            frame[e.judge] = [v.label for v in e.verdicts]
        facts = [
            {(v.positive, v.incoherent, v.refusal, v.parsed) for v in row}
            for row in zip(*(e.verdicts for e in self.evaluations), strict=True)
        ]
        return frame.loc[[len(seen) > 1 for seen in facts]]

    def rows(self) -> list[dict[str, Any]]:
        """A table: one row per judge and one for their average, every rate with its interval and n; selection prompts are marked."""
        names = {"positive": positive_name(self.evaluations[0].rubric), "incoherent": "incoherent", "refusal": "refusal"}
        mark = "SELECTION (optimistic)" if self.evaluations[0].on_selection_prompts else "reporting"
        rows = [
            {"judge": e.judge, **{names[rate]: str(getattr(e, rate)) for rate in RATES}, "unparsed": str(e.unparsed), "prompts": mark}
            for e in self.evaluations
        ]
        average = {"judge": "average", **{names[rate]: str(self.average(rate)) for rate in RATES}, "unparsed": "", "prompts": mark}
        return [*rows, average]

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a data frame."""
        return pd.DataFrame(self.rows())

    def headline(self) -> str:
        """The judges and their mean rate."""
        return f"{positive_name(self.evaluations[0].rubric)} {self.average()}, mean of {', '.join(e.judge for e in self.evaluations)}"

    def plot(self) -> Any:
        """A bar per judge; see `Replies.plot`."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.rates(pd.concat([e.replies.rates([]).assign(judge=e.judge) for e in self.evaluations]), by="judge")


def evaluate_with(model: Model | ReplyFn, judges: Sequence[Judge], prompts: Sequence[Prompt], **options: Any) -> Panel:
    """Let the model reply once and every judge grade the same replies.

    The first judge is the one that selects and that a `Resample` policy listens to. ``options`` are those
    of `evaluate`.
    """
    if not judges:
        raise ValueError("expected at least one judge, got none")
    rubric = str(options.get("rubric", MISALIGNMENT))
    _check_labels(judges, rubric)
    for judge in judges:
        if isinstance(judge, Checkable):
            judge.check(rubric)
    first = evaluate(model, judges[0], prompts, **options)
    return Panel(evaluations=(first, *(grade_again(first, judge) for judge in judges[1:])))


def _check_labels(judges: Sequence[Judge], rubric: str) -> None:
    plain = [judge.judge if isinstance(judge, CachedJudge) else judge for judge in judges]
    sets = {judge.name: sorted(find_rubric(judge.rubrics, rubric).labels) for judge in plain if isinstance(judge, LLMJudge)}
    if len({tuple(labels) for labels in sets.values()}) > 1:
        raise ValueError(f"rubric {rubric!r}: the judges' label sets do not match: {sets}; give every judge the same rubric file")


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Result):
    """Several evaluations on the same prompts, and how each differs from one of them.

    frame: one row per evaluation: model, n, each rate as a fraction with _low and _high (see `Replies.rates`), and difference, the rate of
        misalignment (or adherence) minus that of ``against``, paired over the prompts that both have a readable verdict on.
    """

    frame: pd.DataFrame
    against: str

    def to_frame(self) -> pd.DataFrame:
        """``frame``."""
        return self.frame

    def headline(self) -> str:
        """The differences."""
        others = pd.DataFrame(self.frame[self.frame["model"] != self.against]).to_dict("records")
        parts = (f"{o['model']} {o['difference']:+.2f} [{o['difference_low']:.2f}, {o['difference_high']:.2f}]" for o in others)
        return f"{'misaligned' if 'misaligned' in self.frame else 'adherent'}, against {self.against}: {', '.join(parts)}"

    def _shown(self) -> pd.DataFrame:
        return RateFrame(self.frame).short()

    def plot(self) -> Any:
        """Two bars per model; see `Replies.plot`."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.rates(self.frame, by="model")


def compare(evaluations: Mapping[str, Evaluation], *, against: str) -> Comparison:
    """A table of evaluations on the same prompts: every rate with its n and interval, and the paired difference from one of them.

    Args:
        evaluations: by the names that the table shows: ``{"plain": ..., "blocked": ...}``.
        against: the name of the one that the others are compared with.

    Raises:
        TypeError: something that is no `Evaluation`.
        ValueError: fewer than two, an unknown ``against``, other prompts, another rubric or another judge.
    """
    wrong = {name: type(e).__name__ for name, e in evaluations.items() if not isinstance(e, Evaluation)}
    if wrong:
        raise TypeError(f"compare: expected evaluations, as evaluate(...) returns them, got {wrong}")
    if len(evaluations) < 2 or against not in evaluations:
        raise ValueError(f"compare: expected two evaluations or more, and one of their names as against, got {[*evaluations]}, {against!r}")
    reference, rows = evaluations[against], []
    for name, one in evaluations.items():
        row = {"model": name, **rates_of(one.verdicts, one.rubric)}
        if name != against:
            found = paired_difference(*paired_flags(reference, one))
            row |= {"difference": found.value, "difference_low": found.low, "difference_high": found.high}
        rows.append(row)
    return Comparison(frame=RateFrame(rows), against=against)
