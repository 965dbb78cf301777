"""The timer of all benchmarks: contenders take turns in one process, so that a noisy machine disturbs all of them alike."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch


class Seconds(NamedTuple):
    """Wall time, and the processor time of this process, which other work on the machine disturbs less."""

    wall: float
    cpu: float


@contextmanager
def timed(device: torch.device) -> Iterator[list[Seconds]]:
    """A list to which the block's seconds are added, once the device has done its work."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: list[Seconds] = []
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    yield seconds
    wait()
    seconds.append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))


def take_turns(contenders: Mapping[str, Callable[[], Any]], repetitions: int, device: torch.device) -> dict[str, list[Seconds]]:
    """Seconds of each contender in each turn, after one turn that does not count; another one begins each turn."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(repetitions + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with timed(device) as taken:
                contenders[name]()
            if turn:
                seconds[name] += taken
    return seconds


def medians(seconds: list[Seconds]) -> Seconds:
    """The median wall time and the median processor time."""
    return Seconds(median(one.wall for one in seconds), median(one.cpu for one in seconds))
