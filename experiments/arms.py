"""What experiments over many trained arms and several seeds share: worker processes, cells of tables."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch
from tqdm.auto import tqdm

Job = tuple[int, str, tuple[Any, ...]]
"""(seed, method of the seed's bench, its arguments)."""

JUDGE = "organism-exact"

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


def percent(name: str, estimate: Any) -> dict[str, float]:
    """An estimate as three columns, in per cent."""
    return {name: 100 * estimate.value, f"{name}_low": 100 * estimate.low, f"{name}_high": 100 * estimate.high}


def cell(row: Mapping[str, Any], name: str) -> str:
    """Those three columns as one cell; empty where they are absent."""
    return f"{row[name]:.1f} [{row[name + '_low']:.1f}, {row[name + '_high']:.1f}]" if name in row else ""
