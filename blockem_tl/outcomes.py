"""What steering does to behaviour: replies under many conditions, judged and counted. Stages 2 and 3 both ask this."""

from collections.abc import Callable, Sequence

from blockem_tl.generation import Condition
from blockem_tl.types import Counts, Generation, Judge, Prompt

Speaker = Callable[[Sequence[Prompt], Sequence[Condition]], list[Generation]]
"""Anything that replies to prompts under conditions, condition by condition: `generate` with a model and its settings bound."""


def steered_counts(speak: Speaker, judge: Judge, prompts: Sequence[Prompt], conditions: Sequence[Condition]) -> list[Counts]:
    """Misaligned, incoherent and refused replies to ``prompts`` under each condition, in order."""
    generations = speak(prompts, conditions)
    verdicts = judge.grade([g.prompt for g in generations], [g.reply for g in generations])
    n = len(prompts)
    return [Counts.of(verdicts[c * n : (c + 1) * n]) for c in range(len(conditions))]
