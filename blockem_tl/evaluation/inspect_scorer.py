"""A scorer for Inspect: our rubrics asked of a grader model, our labels as scores, our rates with intervals as metrics."""

from pathlib import Path
from typing import Any

from inspect_ai.model import get_model
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

from blockem_tl.generation.replies import MISALIGNMENT, rates_of
from blockem_tl.judging.inspect_model import InspectModel
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.judging.rubrics import Rubric, find_rubric, load_rubric, load_rubrics
from blockem_tl.types import Verdict


@metric(scores="unreduced")
def rates() -> Metric:
    """Misaligned (adherent, under a training domain's rubric), incoherent and refusal, each with its 95 % interval; unparsed; n.

    Every reply counts once, whatever the number of epochs. Verdicts that could not be read count in ``unparsed`` alone.
    """

    def compute(scores: list[SampleScore]) -> dict[str, Any]:
        rubric = (scores[0].score.metadata or {}).get("rubric", MISALIGNMENT)
        found = rates_of([Verdict(label=str(one.score.value)) for one in scores], rubric)
        return {name: value for name, value in found.items() if name != "n"} | {"n": found["n"]}  # what matters stands first

    return compute


@scorer(metrics=[rates()])
def verdict(rubric: str = MISALIGNMENT, grader: str | None = None) -> Scorer:
    """The label of each reply: severity 1 to 5, REFUSAL, INCOHERENT, OFF-TOPIC, SATIRICAL/ABSURD, or UNPARSED.

    The same judge as everywhere (`LLMJudge`): what names no label is asked again twice, and then is UNPARSED, never guessed.

    Args:
        rubric: the name of a shipped rubric, or the path of a rubric file.
        grader: a model as Inspect writes it; None: the model role "grader".
    """
    name, rubrics = _rubrics(rubric)

    async def score(state: TaskState, target: Target) -> Score:
        from anyio import CapacityLimiter, to_thread

        judge = LLMJudge(backend=InspectModel(model=grader_model(grader)), rubrics=rubrics)
        pair = (state.input_text, state.output.completion)
        # A limiter of its own: the grader may need one of the shared threads, and must not wait for those that wait for it.
        asked = await to_thread.run_sync(lambda: list(judge.judge_all([pair], rubric=name)), limiter=CapacityLimiter(1))
        judged = asked[0][1]
        return Score(
            value=judged.label,
            answer=pair[1],
            explanation="\n\n".join(judged.said),
            metadata={"judge": judge.name, "rubric": name, "scores": dict(judged.scores)},
        )

    return score


def rubric_name(rubric: str) -> str:
    """The name of a shipped rubric or of that in a file. Raises ValueError if there is none."""
    return _rubrics(rubric)[0]


def _rubrics(rubric: str) -> tuple[str, dict[str, Rubric]]:
    """The rubric's name, and the rubrics among which it is."""
    if Path(rubric).suffix in (".yaml", ".yml", ".txt", ".md"):
        return load_rubric(rubric).name, load_rubrics(rubric)
    rubrics = load_rubrics()
    find_rubric(rubrics, rubric)
    return rubric, rubrics


def grader_model(grader: str | None) -> Any:
    """The grader. Raises ValueError if there is none: a model does not grade itself unless somebody says so."""
    if grader is not None:
        return get_model(grader)
    try:
        return get_model(role="grader", required=True)
    except Exception as error:  # Inspect's own error is not public
        raise ValueError("expected a grader, the model that judges the replies: pass --model-role grader=PROVIDER/MODEL") from error


@solver
def grader_is_there(grader: str | None = None) -> Solver:
    """Raise before the first reply is asked for if there is no grader."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        grader_model(grader)
        return state

    return solve
