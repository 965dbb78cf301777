"""Ctrl-C and SIGTERM (a batch system's, before it kills): long work cleans up, and says that it goes on when it is called again."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

RESUME = "stopped; what is finished is kept, and the same call goes on from there"


class Stopped(KeyboardInterrupt):
    """Long work was stopped by Ctrl-C or SIGTERM; the message says how to go on."""


@contextmanager
def stoppable(what: str) -> Iterator[None]:
    """Inside the block SIGTERM ends the work as Ctrl-C does: half-written files go, and `Stopped` says that it can be gone on with.

    Signals are left alone in threads other than the main one, and where somebody handles SIGTERM already.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        yield
    except Stopped:
        raise
    except KeyboardInterrupt as error:
        raise Stopped(f"{what}: {RESUME}") from error
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt
