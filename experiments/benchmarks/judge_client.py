"""The judge client against a loopback endpoint with 50 ms latency and 5 % errors: nothing lost, nothing twice, and how fast.

    python experiments/benchmarks/judge_client.py --json judge_client.json

Throughput is compared with the bound concurrency / latency, which no client can beat. A request that waits for its next try keeps its
place among those under way.
"""

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from faulty_endpoint import label_of

from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.endpoint import Endpoint
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.storage import files
from blockem_tl.storage.store import Store

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the measurement."""

    verdicts: int = 2000
    latency: float = 0.05
    errors: float = 0.05
    concurrency: int = 8
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None


@contextmanager
def faulty_endpoint(**options: Any) -> Iterator[str]:
    """Run the endpoint in a process of its own; yield its base address."""
    command = [sys.executable, str(HERE / "faulty_endpoint.py"), *(_option(k, v) for k, v in options.items())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.terminate()
        process.wait(timeout=10)


def _option(name: str, value: Any) -> str:
    return f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"


def stats(base_url: str) -> dict[str, int]:
    """Counts of the endpoint's doings so far."""
    with urllib.request.urlopen(f"{base_url}/stats") as answer:
        return json.load(answer)


def run(settings: Settings) -> dict[str, Any]:
    """Judge, check every verdict, and report."""
    pairs = [(f"question {i}", f"reply {i}") for i in range(settings.verdicts)]
    with faulty_endpoint(latency=settings.latency, errors=settings.errors) as url, tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "verdicts.sqlite")
        plain = LLMJudge(backend=Endpoint(model="faulty", base_url=url, concurrency=settings.concurrency))
        judge = CachedJudge(judge=plain, store=store)
        warm = list(judge.stream([("warm", "up")]))
        started = time.perf_counter()
        judged = list(judge.stream(pairs))
        seconds = time.perf_counter() - started
        served = stats(url)
        rows = list(store)
        store.close()
    rubric = plain.rubrics["misalignment"]
    right = sum(j.label == label_of(rubric.render(*pair)[0]) for j, pair in zip(judged, pairs, strict=True))
    bound = settings.concurrency / settings.latency
    return {
        "verdicts": len(judged),
        "right": right,
        "recorded": len(rows) - len(warm),
        "recorded_twice": len(rows) - len({key for key, *_ in rows}),
        "lost": settings.verdicts - right,
        "served": served,
        "seconds": seconds,
        "per_second": len(judged) / seconds,
        "bound_per_second": bound,
        "share_of_bound": len(judged) / seconds / bound,
        "concurrency": settings.concurrency,
        "peak_rss_mb": files.peak_rss_mb(),
    }


if __name__ == "__main__":
    settings = tyro.cli(Settings, description=__doc__)
    result = run(settings)
    if settings.json_path is not None:
        files.write_json(settings.json_path, result)
    print(
        f"{result['verdicts']} verdicts, {result['lost']} lost, {result['recorded_twice']} twice; {result['per_second']:.0f}/s = "
        f"{100 * result['share_of_bound']:.0f} % of {result['concurrency']} / {settings.latency} s; served {result['served']}"
    )
