"""Broken files for every parser of foreign files: each is parsed, or refused by an error that names it, in bounded time and memory.

    python experiments/campaigns/fuzz.py --inputs 1000000 --json fuzz.json
    python experiments/campaigns/fuzz.py --inputs 20000 --only "latent card" --seed 3

Variants of whole files (`mutations.py`) go through the parsers of `fuzz_text.py` and `fuzz_weights.py`. A finding is an error of another
kind, one that does not name its file, a broken promise of what was parsed, more than ``--seconds`` for one input, or more than
``--memory-gb`` in all.
Equal findings, of one kind at one line of code, are shown once, with the shortest input.
"""

import base64
import json
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import tyro
from fuzz_target import Target
from fuzz_text import text_targets
from fuzz_weights import weight_targets
from mutations import Mutator

from blockem_tl.storage import files
from blockem_tl.views.progress import progress_bar
from blockem_tl.views.tables import show

EXPECTED = (ValueError, TypeError, FileNotFoundError)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the campaign."""

    inputs: int = 100_000
    seed: int = 0
    only: tuple[str, ...] = ()
    seconds: float = 5.0
    memory_gb: float = 2.0
    progress: bool = True
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None


class TooLong(BaseException):
    """An input took longer than it may."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block if it takes more processor time, which a busy machine does not count in, or waits ten times as long."""

    def stop(*_: object) -> None:
        raise TooLong

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 10 * seconds))
    before = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def fault_of(target: Target, path: Path, seconds: float) -> tuple[str, str]:
    """("parsed" or "refused", ""), or ("finding", what was wrong and where)."""
    try:
        with bounded(seconds):
            target.parse(path)
        return "parsed", ""
    except EXPECTED as error:
        names = not target.named or Path(target.file).name in str(error) or path.parent.name in str(error)
        return ("refused", "") if names else ("finding", f"names no file: {type(error).__name__} {_place(error)}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also panics of extensions
        return "finding", f"{type(error).__name__} {_place(error)}"


def _place(error: BaseException) -> str:
    """The last line of our own code that the error passed."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "blockem_tl" in frame.filename or "fuzz_" in frame.filename]
    return f"at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {str(error)[:100]}" if ours else str(error)[:100]


def fuzz(target: Target, n: int, *, seed: int, seconds: float = 5.0, bar: Any = None, mutator: Any = Mutator) -> dict[str, Any]:
    """How ``n`` inputs went, and the findings, each with how often and its shortest input."""
    counts, found = Counter[str](), dict[str, Any]()
    mutate, start = mutator(target.seeds, seed, structured=target.structured), time.monotonic()
    memory = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / target.file
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(n):
            path.write_bytes(content := mutate())
            kind, what = fault_of(target, path, seconds)
            counts[kind] += 1
            if what:
                key = what.split(": ")[0] if "finding" in kind else what
                one = found.setdefault(key, {"what": what, "n": 0, "input": content})
                one["n"] += 1
                one["input"] = min(one["input"], content, key=len)
            if bar is not None:
                bar.update()
    grown = (psutil.Process().memory_info().rss - memory) / 1e6
    shown = [{**one, "input": _shown(one["input"])} for one in found.values()]
    row = {"parser": target.name, "inputs": n, "parsed": counts["parsed"], "refused": counts["refused"], "findings": len(shown)}
    return {**row, "seconds": round(time.monotonic() - start, 1), "grown_mb": round(grown), "found": shown}


def _shown(content: bytes) -> str:
    try:
        return content.decode()[:600]
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(content[:2000]).decode()


def limit_memory(gb: float) -> None:
    """No more than so much memory on top of what is used now: an input that asks for more is a finding, a MemoryError."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (int(psutil.Process().memory_info().vms + gb * 1e9), resource.RLIM_INFINITY))


def main(settings: Settings) -> None:
    """Run all parsers, or those that are named; exit code 1 if there is a finding."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        chosen = [
            one for one in [*text_targets(Path(folder)), *weight_targets(Path(folder))] if not settings.only or one.name in settings.only
        ]
        limit_memory(settings.memory_gb)
        whole = sum(one.share for one in chosen)
        shares = [(one, max(1, round(settings.inputs * one.share / whole))) for one in chosen]
        rows = []
        with progress_bar(total=sum(n for _, n in shares), show=settings.progress, unit="input") as bar:
            for one, n in shares:
                bar.set_description(one.name)
                rows.append(fuzz(one, n, seed=settings.seed, seconds=settings.seconds, bar=bar))
    show(
        [{k: f"{v}" for k, v in row.items() if k != "found"} for row in rows],
        f"{sum(row['inputs'] for row in rows)} inputs, seed {settings.seed}",
    )
    for row in rows:
        for one in row["found"]:
            print(f"{row['parser']}: {one['n']} x {one['what']}\n    {json.dumps(one['input'])[:300]}")
    if settings.json_path is not None:
        files.write_json(settings.json_path, {"seed": settings.seed, "environment": files.environment(), "parsers": rows})
    raise SystemExit(any(row["found"] for row in rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
