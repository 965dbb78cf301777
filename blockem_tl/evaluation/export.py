"""Replies and verdicts for other tools and back: parquet, and Inspect logs that `inspect view` opens."""

import io
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import pandas as pd

from blockem_tl.evaluation.evaluate import Evaluation
from blockem_tl.generation.replies import positive_name
from blockem_tl.storage import files
from blockem_tl.types import LABELS, UNPARSED, Generation, Prompt, Verdict

_COLUMNS = {
    "rubric": str,
    "judge": str,
    "prompt_id": str,
    "category": str,
    "prompt": str,
    "system": object,
    "canary": str,
    "condition": str,
    "reply": str,
    "reply_ids": object,
    "truncated": bool,
    "label": str,
    "on_selection_prompts": bool,
    "resampled": int,
}


def to_frame(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    """One row per reply and judge, with all that an `Evaluation` holds."""
    rows = [
        {
            "rubric": e.rubric,
            "judge": e.judge,
            "prompt_id": g.prompt.id,
            "category": g.prompt.category,
            "prompt": g.prompt.text,
            "system": g.prompt.system,
            "canary": g.prompt.canary,
            "condition": g.condition,
            "reply": g.reply,
            "reply_ids": list(g.reply_ids),
            "truncated": g.truncated,
            "label": v.label,
            "on_selection_prompts": e.on_selection_prompts,
            "resampled": e.resampled,
        }
        for e in evaluations
        for g, v in zip(e.generations, e.verdicts, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def from_frame(frame: pd.DataFrame, where: str = "frame") -> list[Evaluation]:
    """The evaluations in such a frame, one per rubric and judge, in order of appearance.

    Raises:
        ValueError: missing columns, or labels that this library does not know.
    """
    missing = [column for column in _COLUMNS if column not in frame.columns]
    if missing:
        raise ValueError(f"{where}: expected the columns {list(_COLUMNS)}, got {list(frame.columns)}; {missing} are missing")
    unknown = sorted(set(frame.label) - {*LABELS, UNPARSED})
    if unknown:
        raise ValueError(f"{where}: the label sets do not match: expected {(*LABELS, UNPARSED)}, got also {unknown}; map them first")
    found = []
    for key, part in frame.groupby(["rubric", "judge"], sort=False):
        rubric, judge = cast(tuple[str, str], key)
        rows: list[dict[Any, Any]] = part.to_dict("records")
        found.append(
            Evaluation(
                rubric=rubric,
                judge=judge,
                generations=tuple(_generation(row) for row in rows),
                verdicts=tuple(Verdict(label=row["label"]) for row in rows),
                on_selection_prompts=bool(rows[0]["on_selection_prompts"]),
                resampled=int(rows[0]["resampled"]),
            )
        )
    return found


def _generation(row: dict[Any, Any]) -> Generation:
    system = row["system"] if isinstance(row["system"], str) else None
    prompt = Prompt(id=row["prompt_id"], text=row["prompt"], category=row["category"], system=system, canary=row["canary"])
    return Generation(
        prompt=prompt,
        condition=row["condition"],
        reply=row["reply"],
        reply_ids=tuple(int(i) for i in row["reply_ids"]),
        truncated=bool(row["truncated"]),
    )


def write_parquet(path: Path | str, evaluations: Sequence[Evaluation]) -> Path:
    """Write the evaluations as one parquet file, atomically."""
    buffer = io.BytesIO()
    to_frame(evaluations).to_parquet(buffer, index=False)
    return files.write_bytes(path, buffer.getvalue())


def read_parquet(path: Path | str) -> list[Evaluation]:
    """Read what `write_parquet` wrote. Raises ValueError where it is something else."""
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a parquet file, got: {error}") from error
    return from_frame(frame, str(path))


# ------------------------------------------------------------------------------------------------ Inspect


def write_inspect(path: Path | str, evaluations: Sequence[Evaluation], *, model: str, task: str = "emergent misalignment") -> Path:
    """Write evaluations of the same replies (one per judge) as an Inspect log; ``path`` ends in .eval or .json.

    One sample per reply, one score per judge, and every rate with its interval and n among the results.

    Raises:
        ValueError: another ending, no evaluations, or evaluations of different replies.
    """
    inspect, path = _inspect(), Path(path)
    if path.suffix not in (".eval", ".json"):
        raise ValueError(f"{path}: expected a name ending in .eval or .json, which Inspect's viewer looks for")
    if not evaluations or len({e.generations for e in evaluations}) > 1:
        raise ValueError("an Inspect log: expected at least one evaluation, all of the same replies; write one log per model or prompt set")
    now, first = datetime.now(timezone.utc).isoformat(timespec="seconds"), evaluations[0]
    n = len(first.generations)
    log = inspect.EvalLog(
        status="success",
        eval=inspect.EvalSpec(
            created=now,
            task=task,
            model=model,
            config=inspect.EvalConfig(),
            packages=files.environment(),
            dataset=inspect.EvalDataset(
                name="selection prompts" if first.on_selection_prompts else "prompts",
                samples=n,
                sample_ids=[g.prompt.id for g in first.generations],  # their order, which Inspect does not keep among the samples
            ),
            metadata={"rubric": first.rubric, "on_selection_prompts": first.on_selection_prompts, "resampled": first.resampled},
        ),
        results=inspect.EvalResults(total_samples=n, completed_samples=n, scores=[_score(inspect, e) for e in evaluations]),
        stats=inspect.EvalStats(started_at=now, completed_at=now),
        samples=[_sample(inspect, evaluations, i, model) for i in range(n)],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.temporary_beside(path, folder=True) as folder:
        inspect.write_eval_log(log, str(folder / path.name))
        (folder / path.name).replace(path)
    return path


def _score(inspect: Any, evaluation: Evaluation) -> Any:
    metrics = {}
    names = {positive_name(evaluation.rubric): "positive", "incoherent": "incoherent", "refusal": "refusal", "unparsed": "unparsed"}
    for name, attribute in names.items():
        rate = getattr(evaluation, attribute)
        low, high = rate.interval
        for key, value in ((name, rate.value), (f"{name}_low", low), (f"{name}_high", high), (f"{name}_n", rate.n)):
            metrics[key] = inspect.EvalMetric(name=key, value=value)
    return inspect.EvalScore(name=evaluation.judge, scorer=evaluation.judge, metrics=metrics, metadata={"rubric": evaluation.rubric})


def _sample(inspect: Any, evaluations: Sequence[Evaluation], index: int, model: str) -> Any:
    from inspect_ai.model import ChatMessageAssistant, ModelOutput
    from inspect_ai.scorer import Score

    g = evaluations[0].generations[index]
    asked = messages(g.prompt)
    return inspect.EvalSample(
        id=g.prompt.id,
        epoch=1,
        input=asked,
        target="",
        messages=[*asked, ChatMessageAssistant(content=g.reply)],
        output=ModelOutput.from_content(model, g.reply, stop_reason="max_tokens" if g.truncated else "stop"),
        scores={e.judge: Score(value=e.verdicts[index].label, answer=g.reply) for e in evaluations},
        metadata={"category": g.prompt.category, "canary": g.prompt.canary, "condition": g.condition, "reply_ids": list(g.reply_ids)},
    )


def messages(prompt: Prompt) -> list[Any]:
    """A prompt as Inspect's chat messages."""
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser

    system = [] if prompt.system is None else [ChatMessageSystem(content=prompt.system)]
    return [*system, ChatMessageUser(content=prompt.text)]


def read_inspect(path: Path | str) -> list[Evaluation]:
    """Read what `write_inspect` or the task `emergent_misalignment` wrote. Raises ValueError where it is something else."""
    inspect = _inspect()
    try:
        log = inspect.read_eval_log(str(path))
    except Exception as error:  # Inspect raises whatever its readers do
        raise ValueError(f"{path}: expected an Inspect log, got: {error}") from error
    mark, rows = log.eval.metadata or {}, []
    if "rubric" not in mark:
        raise ValueError(
            f"{path}: expected an Inspect log written by blockem_tl, which names its rubric; got one of task {log.eval.task!r}"
        )
    place = {str(id_): i for i, id_ in enumerate(log.eval.dataset.sample_ids or [])}
    for sample in sorted(log.samples or [], key=lambda sample: (sample.epoch, place.get(str(sample.id), 0))):
        system = next((m.text for m in sample.input if m.role == "system"), None)
        shared = {"prompt_id": str(sample.id), "prompt": sample.input[-1].text, "system": system, "reply": sample.output.completion}
        for judge, score in (sample.scores or {}).items():
            rows.append(
                {
                    **mark,
                    **shared,
                    **sample.metadata,
                    "judge": (score.metadata or {}).get("judge", judge),
                    "label": str(score.value),
                    "truncated": sample.output.stop_reason == "max_tokens",
                }
            )
    return from_frame(pd.DataFrame(rows, columns=list(_COLUMNS)), str(path))


def _inspect() -> Any:
    try:
        import inspect_ai.log
    except ImportError as error:
        raise ImportError('Inspect logs need inspect-ai: pip install "blockem-tl[inspect]"') from error
    return inspect_ai.log
