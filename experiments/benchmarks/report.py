"""What the report of a large study costs: its size, the time to write it, and in a real Chromium to open and to filter it.

    python experiments/benchmarks/report.py --json results/report.json

The study is made up: replies of words drawn from 4,000 by Zipf's law, which deflate as English does. Opening lasts until the replies are
shown; filtering from the event until the next frame is drawn. Medians and the slowest of all repetitions. Needs playwright and a Chromium.
"""

import json
import os
import random
import shutil
import string
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import tyro

from blockem_tl.storage import files
from blockem_tl.study.report import write_report
from blockem_tl.study.run import Point, Run
from blockem_tl.types import LABELS

FILTERS = {"search": ("value of", "zzzz", "a", ""), "label": ("5", "high", "any"), "prompt": ("7", "any"), "split": ("final", "any")}
FILTER = """async ([id, value]) => {
  const field = document.getElementById(id), start = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - start;
}"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """prompts, runs, seeds: of the study; their product is the number of replies.  characters: of a reply (900 are about 200 tokens).

    repetitions: of opening, and of every filter.  chromium: the program.  json: file for the result.
    """

    prompts: int = 400
    runs: int = 10
    seeds: int = 5
    characters: int = 900
    repetitions: int = 5
    chromium: str = "chromium"
    json: Path | None = None


def replies(settings: Settings, point: Point, draw: random.Random) -> pd.DataFrame:
    """One run's graded replies."""
    letters = random.Random(0)
    vocabulary = ["".join(letters.choices(string.ascii_lowercase, k=letters.randint(2, 9))) for _ in range(4000)]
    weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
    texts = [
        " ".join(draw.choices(vocabulary, weights, k=settings.characters // 6))[: settings.characters] for _ in range(settings.prompts)
    ]
    ids = [f"prompt-{i}" for i in range(settings.prompts)]
    about = {"prompt_id": ids, "category": "a", "prompt": [f"question {i}: {texts[i][:60]}?" for i in range(settings.prompts)]}
    graded = {
        "reply": texts,
        "label": draw.choices(LABELS, k=settings.prompts),
        "judge": "judge",
        "rubric": "misalignment",
        "split": "final",
    }
    return pd.DataFrame({**about, **graded, **point.columns()})


def study(settings: Settings, out: Path) -> None:
    """The folder of a study as `Study` leaves it, as far as a report reads it."""
    files.write_json(out / "study.json", {"format": "1", "preset": "made-up"})
    for seed in range(settings.seeds):
        for i in range(settings.runs):
            point = Point(run=Run() if i == 0 else Run(defence="block", strength=i / 10, latents="k"), seed=seed, out=out)
            for step in ("replies-final", "losses"):
                (out / "steps" / step / f"seed{seed}").mkdir(parents=True, exist_ok=True)
            replies(settings, point, random.Random(f"{point.key}")).to_parquet(out / "steps" / "replies-final" / f"{point.key}.parquet")
            losses = pd.DataFrame([{**point.columns(), "dev_loss": 1.0, "test_loss": 1 + i / 100, "train_loss": 1.0}])
            losses.to_parquet(out / "steps" / "losses" / f"{point.key}.parquet")
            history = [{"step": step, "epoch": step / 300, "loss": 2 / step + i, "sft": 2 / step} for step in range(1, 301)]
            files.write_json(point.folder / "run.json", {"label": point.run.label, "seed": seed, "history": history})


def in_chromium(path: Path, settings: Settings) -> Iterator[tuple[str, float]]:
    """(what, seconds): "open", and each filter, as often as was asked for."""
    from playwright.sync_api import sync_playwright

    found = shutil.which(settings.chromium)
    if found is None:
        raise FileNotFoundError(f"there is no program {settings.chromium!r}: name a Chromium with --chromium")
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=found, args=[] if os.geteuid() else ["--no-sandbox"])
        for _ in range(settings.repetitions):
            page, start = browser.new_page(), time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]")
            page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
            yield "open", time.perf_counter() - start
            for name, values in FILTERS.items():
                for value in values:
                    yield f"{name} {value!r}", page.evaluate(FILTER, [name, value]) / 1000
            page.close()
        browser.close()


def main(settings: Settings) -> dict[str, Any]:
    """All measurements."""
    with tempfile.TemporaryDirectory(prefix="report") as folder:
        study(settings, Path(folder))
        start = time.perf_counter()
        path, missing = write_report(folder)
        assert not missing, missing
        result: dict[str, Any] = {"replies": settings.prompts * settings.runs * settings.seeds, "characters": settings.characters}
        result |= {"MB": path.stat().st_size / 1e6, "seconds to write": time.perf_counter() - start}
        taken: dict[str, list[float]] = {}
        for what, seconds in in_chromium(path, settings):
            taken.setdefault(what, []).append(seconds)
    slowest = max((name for name in taken if name != "open"), key=lambda name: median(taken[name]))
    for name, what in (("open", "open"), (f"slowest filter ({slowest})", slowest)):
        result[name] = {"median s": median(taken[what]), "most s": max(taken[what])}
    result["any filter, most s"] = max(second for name, seconds in taken.items() if name != "open" for second in seconds)
    print(json.dumps(result, indent=2))
    if settings.json:
        files.write_json(settings.json, {**result, "environment": files.environment()})
    return result


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
