"""Shared by experiments over many trained arms and several seeds: worker processes, cells of tables."""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch
from tqdm.auto import tqdm

Job = tuple[int, str, tuple[Any, ...]]
"""(seed, method of the seed's make_setting, its arguments)."""

JUDGE = "organism-exact"

_made: dict[int, Any] = {}


def end_with_parent(parent: int) -> None:
    """Let this worker end when its parent has: killed, a parent cannot tell it to, and it would go on for nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(make_setting: Callable[[Any, int], Any], settings: Any, seed: int, method: str, arguments: tuple[Any, ...]) -> None:
    """A worker's job: one method of the seed's setting, which is made once per process."""
    torch.set_num_threads(1)
    if seed not in _made:
        _made[seed] = make_setting(settings, seed)
    getattr(_made[seed], method)(*arguments)


class WorkerPool:
    """Runs jobs side by side, in processes of one thread each. ``make_setting(settings, seed)`` makes what they work on."""

    def __init__(self, settings: Any, make_setting: Callable[[Any, int], Any]) -> None:
        self.settings, self.make_setting = settings, make_setting

    def __enter__(self):
        self.pool = ProcessPoolExecutor(
            self.settings.workers, mp_context=get_context("spawn"), initializer=end_with_parent, initargs=(os.getpid(),)
        )
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)

    def _run(self, title: str, jobs: Sequence[Job]) -> None:
        futures = [self.pool.submit(work, self.make_setting, self.settings, *job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(futures), desc=title, disable=not futures):
            future.result()


def percent(name: str, estimate: Any) -> dict[str, float]:
    """An estimate as three columns, in per cent."""
    return {name: 100 * estimate.value, f"{name}_low": 100 * estimate.low, f"{name}_high": 100 * estimate.high}


def cell(row: Mapping[str, Any], name: str) -> str:
    """Those three columns as one cell; empty where they are absent."""
    return f"{row[name]:.1f} [{row[name + '_low']:.1f}, {row[name + '_high']:.1f}]" if name in row else ""
