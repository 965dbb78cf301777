"""Memory while judging very many replies from disk, in and out of files.

    python experiments/benchmarks/judge_memory.py --json out.json               # 200,000 replies, a backend that answers at once
    python experiments/benchmarks/judge_memory.py --replies 20000 --endpoint    # through HTTP, with errors

Resident memory is read at every tenth of the way; flat means that the last tenth is within a few MB of the second.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro
from judge_client import faulty_endpoint

from blockem_tl.judging.backend import Backend, Completion, Request
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.endpoint import Endpoint
from blockem_tl.judging.files import judge_file
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.storage import files
from blockem_tl.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the measurement."""

    replies: int = 200_000
    words: int = 150
    endpoint: bool = False
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None


class Measured:
    """A backend around another, or around nothing, that reads this process's memory now and then."""

    name = "measured"

    def __init__(self, inner: Backend | None, every: int) -> None:
        self.inner, self.every, self.seen, self.mb = inner, every, 0, list[float]()

    def check(self) -> None:
        """Nothing to check."""

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """The inner backend's completions, or the same label at once."""
        done = (
            self.inner.complete(requests) if self.inner else ((i, Completion(text="So be it.\nANSWER: 1")) for i, _ in enumerate(requests))
        )
        for pair in done:
            self.seen += 1
            if self.seen % self.every == 0:
                self.mb.append(psutil.Process().memory_info().rss / 1e6)
            yield pair


def run(settings: Settings) -> dict[str, Any]:
    """Write the replies, judge them, count."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        source, target = Path(folder) / "replies.jsonl", Path(folder) / "verdicts.jsonl"
        with source.open("w") as file:
            for i in range(settings.replies):
                file.write(json.dumps({"id": i, "prompt": f"question {i}", "reply": f"reply {i} " * settings.words}) + "\n")
        inner = None
        if settings.endpoint:
            url = stack.enter_context(faulty_endpoint(latency=0.01, errors=0.05, seconds=3600))
            inner = Endpoint(model="faulty", base_url=url, concurrency=16)
        backend = Measured(inner, max(1, settings.replies // 10))
        store = Store(Path(folder) / "verdicts.sqlite")
        counts = judge_file(CachedJudge(judge=LLMJudge(backend=backend), store=store), source, target)
        with target.open() as file:
            lines = sum(1 for _ in file)
        stored = len(store)
        store.close()
        return {
            "replies": settings.replies,
            "verdicts": sum(counts.values()),
            "lines": lines,
            "stored": stored,
            "rss_mb": backend.mb,
            "growth_mb": backend.mb[-1] - backend.mb[1],
            "input_mb": source.stat().st_size / 1e6,
        }


if __name__ == "__main__":
    settings = tyro.cli(Settings, description=__doc__)
    result = run(settings)
    if settings.json_path is not None:
        files.write_json(settings.json_path, result)
    print(
        f"{result['verdicts']} verdicts over {result['input_mb']:.0f} MB of replies; memory by tenths "
        f"{[round(mb) for mb in result['rss_mb']]} MB, {result['growth_mb']:+.1f} MB from the second to the last"
    )
