"""What experiments over many trained arms and several seeds share: worker processes, evaluations as JSON, cells of tables."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch
from tqdm.auto import tqdm

from blockem_tl import Prompt
from blockem_tl.evaluation.evaluate import Evaluation
from blockem_tl.types import Generation, Verdict

Job = tuple[int, str, tuple[Any, ...]]
"""(seed, method of the seed's bench, its arguments)."""

_benches: dict[int, Any] = {}


def work(bench: Callable[[Any, int], Any], settings: Any, seed: int, method: str, arguments: tuple[Any, ...]) -> None:
    """What a worker does: one method of the seed's bench, which is made once per process."""
    torch.set_num_threads(1)
    if seed not in _benches:
        _benches[seed] = bench(settings, seed)
    getattr(_benches[seed], method)(*arguments)


class WorkerPool:
    """Runs jobs side by side, in processes of one thread each. ``bench(settings, seed)`` makes what they work on."""

    def __init__(self, settings: Any, bench: Callable[[Any, int], Any]) -> None:
        self.settings, self.bench = settings, bench

    def __enter__(self):
        self.pool = ProcessPoolExecutor(self.settings.workers, mp_context=get_context("spawn"))
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)

    def _run(self, title: str, jobs: Sequence[Job]) -> None:
        futures = [self.pool.submit(work, self.bench, self.settings, *job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(futures), desc=title, disable=not futures):
            future.result()


def spoken(evaluation: Evaluation) -> dict[str, list[str]]:
    """An evaluation as JSON: replies and labels in prompt order."""
    return {"replies": [g.reply for g in evaluation.generations], "labels": [v.label for v in evaluation.verdicts]}


def heard(said: Mapping[str, list[str]], prompts: Sequence[Prompt], *, rubric: str = "misalignment") -> Evaluation:
    """The evaluation that `spoken` wrote."""
    generations = tuple(
        Generation(prompt=prompt, condition="", reply=text, reply_ids=(), truncated=False)
        for prompt, text in zip(prompts, said["replies"], strict=True)
    )
    verdicts = tuple(Verdict(label=label) for label in said["labels"])
    return Evaluation(rubric=rubric, judge="organism-exact", generations=generations, verdicts=verdicts, on_selection_prompts=False)


def percent(name: str, estimate: Any) -> dict[str, float]:
    """An estimate as three columns, in per cent."""
    return {name: 100 * estimate.value, f"{name}_low": 100 * estimate.low, f"{name}_high": 100 * estimate.high}


def cell(row: Mapping[str, Any], name: str) -> str:
    """Those three columns as one cell; empty where they are absent."""
    return f"{row[name]:.1f} [{row[name + '_low']:.1f}, {row[name + '_high']:.1f}]" if name in row else ""
