"""Replies and their verdicts: every prompt under every condition is answered and graded, or an error says what is missing."""

from collections.abc import Sequence

from blockem_tl.generation._request import check_prompt_indices
from blockem_tl.generation.replies import MISALIGNMENT
from blockem_tl.generation.reply_fn import ReplyFn, stream_replies
from blockem_tl.generation.steering import Condition
from blockem_tl.types import Checkable, Generation, Judge, Prompt, Verdict, check_judge, check_verdicts


def ask(
    reply_fn: ReplyFn,
    judge: Judge,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    *,
    prompt_indices: Sequence[Sequence[int]] | None = None,
    rubric: str = MISALIGNMENT,
) -> tuple[list[Generation], list[Verdict]]:
    """Replies and their verdicts, condition by condition.

    Args:
        prompt_indices: for each condition the indices of the prompts that it asks; None: all prompts.

    Raises:
        ValueError: the reply function or the judge leaves any out.
    """
    check_judge(judge)
    if isinstance(judge, Checkable):
        judge.check(rubric)
    wanted = check_prompt_indices(prompt_indices, len(conditions), len(prompts))
    found = dict(stream_replies(reply_fn, prompts, conditions, wanted))
    generations = [generation for c in range(len(conditions)) for generation in found.get(c, [])]
    verdicts = list(judge.grade([g.prompt for g in generations], [g.reply for g in generations], rubric=rubric))
    check_verdicts(judge, verdicts, len(generations))
    expected = sum(map(len, wanted))
    if not len(generations) == len(verdicts) == expected or any(len(found[c]) != len(part) for c, part in enumerate(wanted)):
        raise ValueError(
            f"expected {expected} replies and as many verdicts from judge {judge.name!r}, got {len(generations)} and {len(verdicts)}: "
            "rates over a part would be wrong"
        )
    return generations, verdicts
