"""A command in a process of its own, which is killed at a file or after a time."""

import gc
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockem_tl.views.progress import VARIABLE

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "sqlite3.connect"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    status: 0 if all went well.  touched: how many files it had opened for writing, moved or removed.  said: its output, and its error.
    """

    status: int
    killed: bool
    touched: int
    seconds: float
    said: str


def run(do: Callable[[], Any], folder: Path, *, kill_at_file: int = 0, kill_after: float = float("inf"), patience: float = 600.0) -> Ended:
    """Do something in a fork of this process, with ``folder`` as its working directory.

    Args:
        kill_at_file: the process is killed before it touches so many files of ``folder``; 0: never.
        kill_after: seconds after which it is killed.
        patience: seconds after which it counts as hanging.
    """
    folder.mkdir(parents=True, exist_ok=True)
    touched, out, started = mmap.mmap(-1, 8), folder.with_suffix(".said"), time.monotonic()
    child = os.fork()
    if child == 0:
        _child(do, folder, out, touched, kill_at_file)
    status = _status(child, started, min(kill_after, patience))
    seconds = time.monotonic() - started
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    hangs = killed and seconds >= patience
    text = f"hangs for {patience:.0f} s" if hangs else out.read_text(errors="replace")
    n = int.from_bytes(touched[:8], "little")
    return Ended(status=status, killed=killed and not hangs, touched=n, seconds=seconds, said=text if not status else text[-600:])


def _status(child: int, started: float, most: float) -> int:
    """The exit status of a child that is killed if it takes longer."""
    while time.monotonic() - started < most:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _child(do: Callable[[], Any], folder: Path, out: Path, touched: mmap.mmap, kill_at_file: int) -> None:
    """Do it, and end this process: by the signal when it is about to touch that file."""
    status = 1
    gc.freeze()  # what the parent made is not looked at
    try:
        os.chdir(folder)
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        error = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(error, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ[VARIABLE] = "0"
        torch.set_num_threads(1)
        _count_files(os.path.realpath(folder), touched, kill_at_file)
        do()
        gc.collect()  # stores are closed, as at the end of a process; what its parent has open stays
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    sys.stdout.flush()
    os._exit(status)


def _count_files(folder: str, touched: mmap.mmap, kill_at_file: int) -> None:
    """From now on, count what is done to files below ``folder``, and be killed at one of them."""

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event not in CHANGES and not (event == "open" and isinstance(given[2], int) and given[2] & WRITING):
            return
        path = given[0]
        if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(folder):
            return
        n = int.from_bytes(touched[:8], "little") + 1
        touched[:8] = n.to_bytes(8, "little")
        if n == kill_at_file:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
