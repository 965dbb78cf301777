"""Where the jobs of a study run: one after the other in this process, side by side in processes, or on Ray; the results are the same."""

import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from blockem_tl.study.setting import Setting

EXECUTORS = ("local", "ray")
PATIENCE = 30.0
"""Seconds that Ray's workers get to end."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to do, of a seed and a narrow task ("": the study's). It writes its own result, whole or not at all, or returns it."""

    do: Callable[[Setting], Any]
    seed: int
    domain: str = ""


class Ended(NamedTuple):
    """A job that has ended: its index, what it returned, and its traceback ("" if it went well)."""

    index: int
    value: Any
    error: str


@runtime_checkable
class Executor(Protocol):
    """Runs jobs, ``workers`` of them at a time; what a process loads, it keeps."""

    workers: int

    def run(self, jobs: Sequence[Job]) -> Generator[Ended, None, None]:
        """The jobs as they end. Closed or interrupted before the last one, no job goes on: whoever stops may unlock the folder."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


def executor_of(name: str, setting: Setting, workers: int | None, cards: int = 1) -> Executor:
    """The executor of that name; on Ray each worker has so many cards.

    Raises:
        ValueError: another name, or a number of workers that is none.
        ImportError: Ray is not installed.
    """
    if name not in EXECUTORS:
        raise ValueError(f"executor: expected one of {EXECUTORS}, got {name!r}")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ValueError(f"workers: expected a whole number, at least 1, got {workers!r}")
    if name == "ray":
        if find_spec("ray") is None:
            raise ImportError('executor="ray" needs Ray, which is not installed: pip install "blockem-tl[ray]", or take executor="local"')
        return RayExecutor(setting, workers or 2, cards)
    return InProcess(setting) if workers in (None, 1) else Processes(setting, workers or 1)


def do(setting: Setting, job: Job) -> tuple[Any, str]:
    """What a job returns, and its traceback if it failed. Adapters that it left in the model are taken out."""
    here = setting.at(seed=job.seed, domain=job.domain)
    try:
        return job.do(here), ""
    except Exception:
        return None, traceback.format_exc()
    finally:
        if here.loaded:
            for name in here.model.adapters:
                here.model.remove_adapter(name)


class InProcess:
    """One after the other in this process, which keeps its model."""

    workers = 1

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def run(self, jobs: Sequence[Job]) -> Generator[Ended, None, None]:
        """As `Executor.run`."""
        for index, job in enumerate(jobs):
            yield Ended(index, *do(self.setting, job))

    def close(self) -> None:
        """Stop what the setting has started."""
        self.setting.close()


# ------------------------------------------------------------------------------------------------ processes

_worker: list[tuple[Setting, Event]] = []


def _start(setting: Setting, threads: int, parent: int, stopped: Event) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    torch.set_num_threads(threads)
    _worker.append((setting, stopped))
    Finalize(None, setting.close, exitpriority=10)  # before the process waits for its children
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Killed, a parent cannot tell its workers to end, and they would go on for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _do(job: Job) -> tuple[Any, str]:
    setting, stopped = _worker[0]
    return (None, "stopped") if stopped.is_set() else do(setting, job)


class Processes:
    """Side by side in processes, each with as many threads as this one and a model of its own."""

    def __init__(self, setting: Setting, workers: int) -> None:
        self.workers = workers
        self._given = (setting, torch.get_num_threads(), os.getpid())
        self._context = get_context("spawn")
        self._stopped: Event = self._context.Event()
        self._pool: ProcessPoolExecutor | None = None

    def run(self, jobs: Sequence[Job]) -> Generator[Ended, None, None]:
        """As `Executor.run`. A worker that dies takes those jobs along that are not done."""
        if self._pool is None:
            self._stopped = self._context.Event()
            self._pool = ProcessPoolExecutor(self.workers, self._context, _start, (*self._given, self._stopped))
        futures: dict[Future[tuple[Any, str]], int] = {self._pool.submit(_do, job): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                lost = future.exception()
                yield Ended(futures[future], *(future.result() if lost is None else (None, f"{type(lost).__name__}: {lost}")))
        except BaseException:
            self._interrupt()
            raise
        if any(isinstance(future.exception(), BrokenExecutor) for future in futures):
            self.close()  # so that the next run starts with whole ones

    def _interrupt(self) -> None:
        """Ctrl-C in every worker, so that what it does cleans up and nothing else begins; all are gone when this returns."""
        self._stopped.set()
        for pid in list(getattr(self._pool, "_processes", None) or ()):  # the pool has no public way to tell
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        self.close()

    def close(self) -> None:
        """End the processes; a later run starts others."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None


# ------------------------------------------------------------------------------------------------ Ray


def _ray() -> tuple[Any, Any]:
    """Ray and its pickle, which also takes functions of a script."""
    if "ray" not in sys.modules:  # read when it is imported: a cluster of its own listens on loopback alone, as it does on Windows
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    return import_module("ray"), import_module("ray.cloudpickle")


class _RayWorker:
    """An actor's life: it has its own model, and imports what the driver can."""

    def __init__(self, path: Sequence[str], threads: int, setting: bytes) -> None:
        _, pickle = _ray()

        sys.path.extend(entry for entry in path if entry not in sys.path)
        torch.set_num_threads(threads)
        self.setting: Setting = pickle.loads(setting)

    def place(self) -> tuple[str, int]:
        """Its node and process."""
        ray, _ = _ray()

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def do(self, job: bytes) -> tuple[Any, str]:
        _, pickle = _ray()

        return do(self.setting, pickle.loads(job))

    def close(self) -> None:
        self.setting.close()


class RayExecutor:
    """Side by side in Ray's actors: in the cluster that this process is connected to or RAY_ADDRESS names, else a local one of its own.

    GPUs are shared out: each worker has ``cards`` of them, or a part of one if there are fewer.
    """

    def __init__(self, setting: Setting, workers: int, cards: int = 1) -> None:
        self.setting, self.workers, self.cards = setting, workers, cards
        self.idle: list[Any] = []
        self.own = False

    def _start(self) -> None:
        ray, pickle = _ray()

        if not ray.is_initialized():
            self.own = True
            address = os.environ.get("RAY_ADDRESS", "local")
            alone = {"num_cpus": self.workers, "include_dashboard": False} if address == "local" else {}
            ray.init(address=address, log_to_driver=False, **alone)
        gpus = ray.cluster_resources().get("GPU", 0)
        make = ray.remote(num_cpus=1, num_gpus=self.cards if self.cards > 1 else min(1.0, gpus / self.workers), max_restarts=-1)(_RayWorker)
        given = (list(sys.path), torch.get_num_threads(), pickle.dumps(self.setting))
        self.idle = [make.remote(*given) for _ in range(self.workers)]

    def run(self, jobs: Sequence[Job]) -> Generator[Ended, None, None]:
        """As `Executor.run`. A worker that dies is started again; its job has failed."""
        ray, pickle = _ray()

        if not self.idle:
            self._start()
        waiting, running = deque(enumerate(jobs)), {}
        try:
            while waiting or running:
                while waiting and self.idle:
                    index, job = waiting.popleft()
                    worker = self.idle.pop()
                    place = worker.place.remote()
                    running[worker.do.remote(pickle.dumps(job))] = (index, worker, place)
                (done, *_), _ = ray.wait(list(running))
                index, worker, _ = running.pop(done)
                self.idle.append(worker)
                try:
                    yield Ended(index, *ray.get(done))
                except ray.exceptions.RayError as lost:
                    yield Ended(index, None, f"{type(lost).__name__}: {lost}")
        except BaseException:
            self._kill([place for _, _, place in running.values()], [*self.idle, *(worker for _, worker, _ in running.values())])
            self.idle = []
            raise

    def _kill(self, places: Sequence[Any], workers: Sequence[Any]) -> None:
        """Kill workers; those that were at work in these places are gone when this returns.

        Ray calls an actor dead when it has sent the kill off, and its process may still write: it is waited for on its own node.
        """
        ray, _ = _ray()

        def until_gone(pid: int) -> None:  # in here, so that Ray sends its code: the module would import torch first
            end = time.monotonic() + PATIENCE
            with suppress(ProcessLookupError):
                while time.monotonic() < end:
                    os.kill(pid, 0)
                    time.sleep(0.01)

        known, _ = ray.wait(list(places), num_returns=len(places), timeout=1) if places else ([], [])  # none: its job has not begun
        at = []
        for place in known:
            with suppress(ray.exceptions.RayError):  # dead already
                at.append(ray.get(place))
        for worker in workers:
            ray.kill(worker)
        affinity = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        wait = ray.remote(num_cpus=0, max_retries=0)(until_gone)
        gone = [wait.options(scheduling_strategy=affinity(node, soft=False)).remote(pid) for node, pid in at]
        if gone:
            ray.wait(gone, num_returns=len(gone), timeout=PATIENCE)

    def close(self) -> None:
        """End the actors, and the cluster if it was made for them."""
        ray, _ = _ray()

        if self.idle and ray.is_initialized():
            ray.wait([worker.close.remote() for worker in self.idle], num_returns=len(self.idle), timeout=PATIENCE)
            for worker in self.idle:
                ray.kill(worker)
        self.idle = []
        if self.own and ray.is_initialized():
            ray.shutdown()
