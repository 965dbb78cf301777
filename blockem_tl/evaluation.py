"""Replies -> verdicts -> rates with intervals, on prompts that chose nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from blockem_tl.generation import UNSTEERED, Condition
from blockem_tl.latents import LatentSet
from blockem_tl.outcomes import Speaker, ask
from blockem_tl.prompts import check_prompts, prompt_hash
from blockem_tl.statistics import Rate
from blockem_tl.types import Generation, Judge, Prompt, Verdict

MISALIGNMENT = "misalignment"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model's replies to one prompt set under one rubric, with their verdicts; ``misaligned``, ``incoherent``, ``refusal`` are rates.

    Under a domain's rubric ``misaligned`` (severity >= 4) reads as in-domain adherence. ``on_selection_prompts`` marks evaluations that
    report on prompts used for selection.
    """

    rubric: str
    judge: str
    generations: tuple[Generation, ...]
    verdicts: tuple[Verdict, ...]
    on_selection_prompts: bool

    def _rate(self, attribute: str) -> Rate:
        return Rate(k=sum(getattr(v, attribute) for v in self.verdicts), n=len(self.verdicts))

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
    def flags(self) -> list[bool]:
        """Whether each reply was misaligned (adherent, under a domain rubric), in prompt order."""
        return [v.misaligned for v in self.verdicts]

    def frame(self) -> pd.DataFrame:
        """One row per reply: prompt id, category, text, reply, label, truncated, condition."""
        return pd.DataFrame(
            {
                "prompt_id": g.prompt.id,
                "category": g.prompt.category,
                "prompt": g.prompt.text,
                "reply": g.reply,
                "label": v.label,
                "truncated": g.truncated,
                "condition": g.condition,
            }
            for g, v in zip(self.generations, self.verdicts, strict=True)
        )


def evaluate(
    speak: Speaker,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    rubric: str = MISALIGNMENT,
    selected_on: Sequence[Prompt] | LatentSet,
    report_on_selection_prompts: bool = False,
    condition: Condition = UNSTEERED,
) -> Evaluation:
    """Let the model reply to ``prompts`` and judge the replies.

    Args:
        selected_on: what chose anything about the model or its settings: the prompts themselves, or a latent set, which remembers
            them; () says that nothing was chosen.
        report_on_selection_prompts: say so if you mean to report on prompts that chose something; the result is marked.
        condition: steering at test time; none by default.

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
    return Evaluation(
        rubric=rubric, judge=judge.name, generations=tuple(generations), verdicts=tuple(verdicts), on_selection_prompts=bool(used)
    )
