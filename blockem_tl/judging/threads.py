"""Many blocking requests at once, in a bounded number of threads, and at an agreed pace."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(items: Iterable[Item], work: Callable[[Item], Result], *, threads: int) -> Iterator[tuple[int, Result]]:
    """Yield (index, result) pairs in the order in which they are done.

    An item is read only when a thread is free for it, so memory does not grow with the number of items. After an error no further item
    is read; the results of those under way are still yielded, and then the first error is raised. A caller that stops early does not
    wait for those under way.
    """
    done: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
    running, errors, source = dict[Future[Result], int](), list[BaseException](), enumerate(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="judge")
    try:
        while True:
            while not errors and len(running) < threads and (upcoming := next(source, None)) is not None:
                index, item = upcoming
                future = pool.submit(work, item)
                running[future] = index
                future.add_done_callback(done.put)
            if not running:
                break
            future = done.get()
            index = running.pop(future)
            if (error := future.exception()) is not None:
                errors.append(error)
            else:
                yield index, future.result()
        if errors:
            raise errors[0]
    finally:
        pool.shutdown(wait=False)


class Pace:
    """A clock that lets through at most ``per_minute`` callers a minute, evenly spread; None for no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self.next = 0.0
        self.lock = threading.Lock()

    def turn(self) -> None:
        """Wait until it is the caller's turn."""
        if not self.interval:
            return  # to sleep for no time would still give the processor away: 2 ms on a busy machine
        with self.lock:
            start = max(self.next, time.monotonic())
            self.next = start + self.interval
        time.sleep(max(0.0, start - time.monotonic()))
