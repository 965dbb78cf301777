"""`ShardedEngine`: replies from several workers, each with a model of its own; from outside it is one engine, with the same replies."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from blockem_tl.generation._request import check_prompt_indices
from blockem_tl.generation.engine import Engine
from blockem_tl.generation.reply_fn import who_replies
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.models.lora import BASE
from blockem_tl.study.executors import Ended, Executor, Job
from blockem_tl.study.setting import Setting
from blockem_tl.types import Generation, Prompt

EngineName = Literal["transformer_lens", "vllm"]

MOST_ROWS = 1024
"""Replies in one job at most: what a killed run loses of each worker."""


@dataclass(frozen=True, kw_only=True)
class WorkerEngine:
    """The engine that every worker makes on the preset's model. Pickled, it is these few words.

    adapters: folders by the names that ``stream(adapter=...)`` knows them by.  options: of the engine.
    """

    name: EngineName = "transformer_lens"
    adapters: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def of(self, setting: Setting) -> Engine:
        """The engine in this process."""
        return setting.engine(self.name, self.adapters, **self.options)

    def spelt(self, adapter: str) -> str:
        """How the worker's engine knows an adapter: TransformerLens by its folder, vLLM by its name."""
        return self.adapters.get(adapter, adapter) if self.name == "transformer_lens" else adapter


class ShardedEngine:
    """An `Engine` that shares out what it is asked over the workers of an executor, as evenly as the number of replies allows.

    A reply does not depend on what runs beside it, so the replies are those of one process: in float32 token for token. Who decides what
    to ask next (the race of `discover`) and who keeps replies is the process that asks: no worker writes into a store. The identity is
    that of the worker's engine: a store that one process has begun, several go on with, and the other way round.

    Args:
        executor: its setting's model replies; ``adapter=None`` means base there.
        engine: what every worker makes.
    """

    def __init__(self, executor: Executor, engine: WorkerEngine) -> None:
        self.executor, self.engine = executor, engine

    @property
    def name(self) -> str:
        """The workers' engine's."""
        return self.engine.name

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        conditions: Sequence[Condition] = (UNSTEERED,),
        prompt_indices: Sequence[Sequence[int]] | None = None,
        adapter: str | Path | None = None,
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float = 0.0,
        seed: int = 0,
        progress: bool = True,
    ) -> Iterator[tuple[int, list[Generation]]]:
        """See `Engine.stream`; without a bar. If a worker fails, what the others reply comes first.

        Raises:
            RuntimeError: a worker failed, with its traceback.
        """
        asked = check_prompt_indices(prompt_indices, len(conditions), len(prompts))
        there: list[dict[int, Generation]] = [{} for _ in asked]
        shares = _shares(asked, self.executor.workers)
        chosen = {"adapter": self._adapter(adapter), "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        reply = partial(_reply, engine=self.engine, prompts=list(prompts), **chosen)
        work = [partial(reply, share=share, conditions=[_portable(conditions[c]) for c in share]) for share in shares]
        for ended in self._done([Job(do=one, seed=0) for one in work]):
            for c, replies in zip(shares[ended.index], ended.value, strict=True):
                there[c] |= dict(zip(shares[ended.index][c], replies, strict=True))
                if len(there[c]) == len(asked[c]):
                    yield c, [there[c][p] for p in asked[c]]

    def identity(self, adapter: str | Path | None) -> str:
        """See `Identified`; a worker computes it."""
        (ended,) = self._done([Job(do=partial(_identity, engine=self.engine, adapter=self._adapter(adapter)), seed=0)])
        return ended.value

    def _adapter(self, adapter: str | Path | None) -> str:
        return self.engine.spelt(BASE if adapter is None else str(adapter))

    def _done(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """The jobs that went well, as they end; then the error of the first that did not."""
        failed = list[Ended]()
        with closing(self.executor.run(jobs)) as running:
            for ended in running:
                if ended.error:
                    failed.append(ended)
                else:
                    yield ended
        if failed:
            head = f"{len(failed)} of {len(jobs)} shares of the replies failed on their workers"
            raise RuntimeError(f"{head} (a store has the others; run the same again). The first one:\n{failed[0].error}")


Share = dict[int, list[int]]
"""The prompts that are asked under each condition, by its index."""


def _shares(asked: Sequence[Sequence[int]], workers: int) -> list[Share]:
    """What is asked, in jobs of nearly as many replies each: as many jobs for each worker as `MOST_ROWS` needs."""
    rows = [(c, p) for c, part in enumerate(asked) for p in part]
    n = min(len(rows), workers * max(1, math.ceil(len(rows) / (workers * MOST_ROWS))))
    shares: list[Share] = [{} for _ in range(n)]
    for i, (c, p) in enumerate(rows):
        shares[i * n // len(rows)].setdefault(c, []).append(p)
    return shares


def _portable(condition: Condition) -> Condition:
    """The condition with directions of its own on the CPU: pickled, a row of a matrix takes the whole matrix along."""
    return replace(condition, steering=tuple(replace(s, direction=s.direction.detach().cpu().clone()) for s in condition.steering))


def _reply(
    setting: Setting,
    *,
    engine: WorkerEngine,
    prompts: Sequence[Prompt],
    share: Share,
    conditions: Sequence[Condition],
    **options: Any,
) -> list[list[Generation]]:
    """A share's replies, condition by condition. Runs in a worker."""
    parts = list(share.values())
    found = dict(engine.of(setting).stream(prompts, conditions=conditions, prompt_indices=parts, progress=False, **options))
    return [found[c] for c in range(len(parts))]


def _identity(setting: Setting, *, engine: WorkerEngine, adapter: str) -> str:
    return who_replies(engine.of(setting), adapter)
