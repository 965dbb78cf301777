"""Many awaitable jobs from plain code, also inside a notebook: an event loop in a thread of its own, a bounded window of jobs in it."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Resource = TypeVar("Resource")


def in_window(
    items: Iterable[Item],
    work: Callable[[Resource, Item], Coroutine[Any, Any, Result]],
    *,
    resource: Callable[[], AbstractAsyncContextManager[Resource]],
    window: int,
) -> Iterator[tuple[int, Result]]:
    """Yield (index, result) as jobs finish. At most ``window`` items are under way, so memory does not grow with the number of items.

    ``resource`` opens what the jobs share (a client) inside the loop and closes it at the end. After a job has raised no new one is
    begun; what the others under way still bring is yielded, then the first error is raised.
    """
    done: queue.SimpleQueue[tuple[int, Future[Result]]] = queue.SimpleQueue()
    running: dict[int, Future[Result]] = {}
    source, failed = enumerate(items), list[BaseException]()
    with _loop() as loop, _entered(loop, resource) as shared:
        try:
            while True:
                while not failed and len(running) < window and (upcoming := next(source, None)) is not None:
                    index, item = upcoming
                    running[index] = asyncio.run_coroutine_threadsafe(work(shared, item), loop)
                    running[index].add_done_callback(lambda future, index=index: done.put((index, future)))
                if not running:
                    break
                index, future = done.get()
                del running[index]
                if (error := future.exception()) is not None:
                    failed.append(error)
                else:
                    yield index, future.result()
            if failed:
                raise failed[0]
        finally:
            for future in list(running.values()):
                future.cancel()


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="judge requests")
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_settle(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _settle() -> None:
    """Let cancelled jobs come to their end before the loop does."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@contextmanager
def _entered(loop: asyncio.AbstractEventLoop, open_it: Callable[[], AbstractAsyncContextManager[Resource]]) -> Iterator[Resource]:
    async def enter() -> tuple[AbstractAsyncContextManager[Resource], Resource]:
        manager = open_it()
        return manager, await manager.__aenter__()

    manager, shared = asyncio.run_coroutine_threadsafe(enter(), loop).result()
    try:
        yield shared
    finally:
        asyncio.run_coroutine_threadsafe(_leave(manager), loop).result()


async def _leave(manager: AbstractAsyncContextManager[Any]) -> None:
    await manager.__aexit__(None, None, None)


class Pace:
    """At most ``per_minute`` starts a minute, evenly spread; None for no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self.next = 0.0

    async def turn(self) -> None:
        """Wait for the next start."""
        start = max(self.next, time.monotonic())
        self.next = start + self.interval
        await asyncio.sleep(max(0.0, start - time.monotonic()))
