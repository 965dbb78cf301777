"""Very many replies of several models, judged by several judges over HTTP: in constant memory, and after a kill only what is missing.

    python experiments/benchmarks/load.py --json load.json                              # 10,000 and 100,000 prompts, 3 models, 2 judges
    python experiments/benchmarks/load.py --sizes 2000 20000 --models 1 --judges 1      # less

Replies are canned. They go the library's way: a file of replies per model, `judge_file` with a `CachedJudge` at an OpenAI-compatible
endpoint, a file of verdicts per model and judge, rates with intervals. Each size runs in a process of its own, whose peak memory is read.
The smallest size is done a second time and killed when half of its verdicts are there; the endpoints count the requests. Every rate is
compared with the one that the endpoint's answers give.
"""

import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import tyro
from faulty_endpoint import label_of
from judge_client import faulty_endpoint, stats

from blockem_tl.generation.replies import MISALIGNMENT, rates_of_labels
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.judging.endpoint import Endpoint
from blockem_tl.judging.files import judge_file
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.judging.rubrics import load_rubrics
from blockem_tl.storage import files
from blockem_tl.storage.store import Store
from blockem_tl.views.tables import show


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the measurement. words: of a reply."""

    sizes: tuple[int, ...] = (10_000, 100_000)
    models: int = 3
    judges: int = 2
    words: int = 50
    concurrency: int = 8
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None


Rates = dict[str, dict[str, Any]]
"""By model and judge."""


def canned(model: int, n: int, words: int) -> Iterator[dict[str, str]]:
    """A model's replies, one by one."""
    for i in range(n):
        yield {"id": f"{i}", "prompt": f"question {i}", "reply": f"model {model} says {i} " + "word " * words}


def judged(folder: Path, n: int, settings: Settings, urls: Sequence[str]) -> Rates:
    """The library's way from replies to rates; what is in the folder's store is not asked again."""
    store, found = Store(folder / "verdicts.sqlite"), Rates()
    for m in range(settings.models):
        source = folder / f"model-{m}.jsonl"
        with source.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in canned(m, n, settings.words))
        for j, url in enumerate(urls):
            grader = LLMJudge(backend=Endpoint(model=f"judge-{j}", base_url=url, concurrency=settings.concurrency))
            counts = judge_file(CachedJudge(judge=grader, store=store), source, folder / f"verdicts-{m}-{j}.jsonl")
            found[f"model {m}, judge {j}"] = rates_of_labels(counts, MISALIGNMENT)
    store.close()
    return found


def work(folder: Path, n: int, settings: Settings, urls: Sequence[str]) -> None:
    """A process's work: the rates, and its own peak memory."""
    started = time.perf_counter()
    rates = judged(folder, n, settings, urls)
    seconds = time.perf_counter() - started
    files.write_json(folder / "done.json", {"rates": rates, "seconds": seconds, "peak_rss_mb": files.peak_rss_mb()})


def measured(folder: Path, n: int, settings: Settings, urls: Sequence[str], *, kill_at: int | None = None) -> dict[str, Any]:
    """What `work` found in a process of its own, and the requests that it took.

    kill_at: answers after which it is killed and begun again; the numbers are the second process's.
    """
    before = _answered(urls)
    folder.mkdir(exist_ok=True)
    process = get_context("spawn").Process(target=work, args=(folder, n, settings, urls))
    process.start()
    while kill_at is not None and _answered(urls) - before < kill_at:
        time.sleep(0.05)
        assert process.is_alive(), "it ended before it could be killed"
    if kill_at is not None:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        at_kill = _answered(urls) - before
        return {"at_kill": at_kill} | measured(folder, n, settings, urls)
    process.join()
    assert process.exitcode == 0, f"judging {n} prompts ended with {process.exitcode}"
    found = files.read_json(folder / "done.json")
    verdicts = n * settings.models * settings.judges
    return {"prompts": n, "verdicts": verdicts, "requests": _answered(urls) - before, "per_second": verdicts / found["seconds"], **found}


def _answered(urls: Sequence[str]) -> int:
    return sum(stats(url).get("answered", 0) for url in urls)


def expected(n: int, settings: Settings) -> Rates:
    """The rates that the endpoints' answers give, counted without the library's judging; the judges agree."""
    rubric, found = load_rubrics()[MISALIGNMENT], Rates()
    for m in range(settings.models):
        labels = Counter(label_of(rubric.render(row["prompt"], row["reply"])[0]) for row in canned(m, n, settings.words))
        found |= {f"model {m}, judge {j}": rates_of_labels(labels, MISALIGNMENT) for j in range(settings.judges)}
    return found


def run(settings: Settings) -> dict[str, Any]:
    """All sizes, and the one that is killed half-way."""
    with ExitStack() as stack:
        urls = [stack.enter_context(faulty_endpoint(latency=0, errors=0, seconds=7200, model=f"judge-{j}")) for j in range(settings.judges)]
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="load-")))
        rows = [measured(place / f"{n}", n, settings, urls) for n in settings.sizes]
        smallest = min(rows, key=lambda row: row["prompts"])
        killed = measured(place / "killed", smallest["prompts"], settings, urls, kill_at=smallest["verdicts"] // 2)
    return {
        "sizes": rows,
        "killed": killed,
        "right": [row["rates"] == expected(row["prompts"], settings) for row in [*rows, killed]],
        "memory_ratio": max(row["peak_rss_mb"] for row in rows) / min(row["peak_rss_mb"] for row in rows),
        "asked_twice": killed["at_kill"] + killed["requests"] - killed["verdicts"],
        "environment": files.environment(),
    }


if __name__ == "__main__":
    settings = tyro.cli(Settings, description=__doc__)
    result = run(settings)
    if settings.json_path is not None:
        files.write_json(settings.json_path, result)
    numbers = ("prompts", "verdicts", "requests", "per_second", "peak_rss_mb")
    show([{name: f"{row[name]:.0f}" for name in numbers} for row in result["sizes"]], f"peak memory x {result['memory_ratio']:.3f}")
    print(f"killed after {result['killed']['at_kill']} of {result['killed']['verdicts']} verdicts: {result['asked_twice']} asked twice")
    print(f"rates as expected: {result['right']}")
