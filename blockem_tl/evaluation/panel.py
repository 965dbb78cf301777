"""Several judges on the same replies: rates per judge, their average, how far they agree, and where they do not."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd

from blockem_tl.evaluation.evaluate import MISALIGNMENT, Evaluation, evaluate, grade_again
from blockem_tl.evaluation.statistics import Estimate, agreement, average_rate
from blockem_tl.generation.replies import Speaker
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.judging.rubrics import find_rubric
from blockem_tl.types import Checkable, Judge, Prompt

RATES = ("misaligned", "incoherent", "refusal")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One evaluation per judge, of the same replies."""

    evaluations: tuple[Evaluation, ...]

    def __post_init__(self) -> None:
        names = [e.judge for e in self.evaluations]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"panel: expected judges with different names, got {names}")
        if len({(e.rubric, tuple(g.reply for g in e.generations)) for e in self.evaluations}) > 1:
            raise ValueError("panel: expected every judge to have graded the same replies under the same rubric")

    def average(self, rate: str = "misaligned") -> Estimate:
        """A rate averaged over the judges (paper B.3)."""
        return average_rate([getattr(e, rate) for e in self.evaluations])

    def agreements(self) -> dict[tuple[str, str], dict[str, Estimate]]:
        """Cohen's kappa of every two judges: on the labels as they are, and on misaligned or not, over replies that both could grade."""
        found = {}
        for one, other in combinations(self.evaluations, 2):
            both = [(a, b) for a, b in zip(one.verdicts, other.verdicts, strict=True) if a.parsed and b.parsed]
            found[one.judge, other.judge] = {
                "labels": agreement([a.label for a, _ in both], [b.label for _, b in both]),
                "misaligned": agreement([str(a.misaligned) for a, _ in both], [str(b.misaligned) for _, b in both]),
            }
        return found

    def disagreements(self) -> pd.DataFrame:
        """The replies on which judges differ about misalignment, incoherence or refusal, or one of them gave no verdict."""
        frame = self.evaluations[0].frame().drop(columns=["label", "judge"])
        for e in self.evaluations:
            frame[e.judge] = [v.label for v in e.verdicts]
        facts = [
            {(v.misaligned, v.incoherent, v.refusal, v.parsed) for v in row}
            for row in zip(*(e.verdicts for e in self.evaluations), strict=True)
        ]
        return frame.loc[[len(seen) > 1 for seen in facts]]

    def rows(self) -> list[dict[str, Any]]:
        """A table: one row per judge and one for their average, every rate with its interval and n; selection prompts are marked."""
        mark = "SELECTION (optimistic)" if self.evaluations[0].on_selection_prompts else "reporting"
        rows = [
            {"judge": e.judge, **{rate: str(getattr(e, rate)) for rate in RATES}, "unparsed": str(e.unparsed), "prompts": mark}
            for e in self.evaluations
        ]
        average = {"judge": "average", **{rate: str(self.average(rate)) for rate in RATES}, "unparsed": "", "prompts": mark}
        return [*rows, average]


def evaluate_with(speak: Speaker, judges: Sequence[Judge], prompts: Sequence[Prompt], **options: Any) -> Panel:
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
    first = evaluate(speak, judges[0], prompts, **options)
    return Panel(evaluations=(first, *(grade_again(first, judge) for judge in judges[1:])))


def _check_labels(judges: Sequence[Judge], rubric: str) -> None:
    plain = [judge.judge if isinstance(judge, CachedJudge) else judge for judge in judges]
    sets = {judge.name: sorted(find_rubric(judge.rubrics, rubric).labels) for judge in plain if isinstance(judge, LLMJudge)}
    if len({tuple(labels) for labels in sets.values()}) > 1:
        raise ValueError(f"rubric {rubric!r}: the judges' label sets do not match: {sets}; give every judge the same rubric file")
