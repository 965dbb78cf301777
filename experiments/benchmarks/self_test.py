"""What the self-test costs at loading: fast, full, and once it has passed.

    python experiments/benchmarks/self_test.py --json results/self_test.json

Seconds of ``load_model(check=...)`` beyond ``check="off"``, medians, on the organism and on a random Llama of SmolLM2-135M's shape.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from random_llama import SHAPES, random_weights, words
from turns import Seconds, medians, timed

from blockem_tl import load_model
from blockem_tl.storage import files


@dataclass(frozen=True, kw_only=True)
class Settings:
    """shape: of the random Llama.  repetitions: of each measurement.  json: file for the result."""

    shape: str = "smollm2-135m"
    repetitions: int = 3
    json: Path | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.repetitions < 1:
            raise ValueError(f"expected a shape among {', '.join(SHAPES)} and at least one repetition")


def seconds(load: Callable[[str], Any], check: str, *, cached: bool, repetitions: int) -> Seconds:
    """Wall and processor seconds of loading with this check; ``cached``: after it has passed before."""
    taken = []
    for _ in range(repetitions):
        os.environ["BLOCKEM_DATA"] = tempfile.mkdtemp(prefix="self-test")
        if cached:
            load(check)
        with timed(torch.device("cpu")) as found:
            load(check)
        taken += found
    return medians(taken)


def run(settings: Settings) -> dict[str, Any]:
    """All measurements."""
    weights, tokenizer = random_weights(settings.shape).state_dict(), words(SHAPES[settings.shape]["vocab_size"])

    def random(check: Any) -> None:
        hf = random_weights(settings.shape)
        hf.load_state_dict(weights)
        load_model(hf, tokenizer=tokenizer, check=check)

    def organism(check: Any) -> None:
        load_model("organism", check=check)

    result: dict[str, Any] = {"environment": files.environment(), "threads": torch.get_num_threads()}
    for name, load in (("organism", organism), (settings.shape, random)):
        without = seconds(load, "off", cached=False, repetitions=settings.repetitions)
        for label, check, cached in (("fast", "fast", False), ("full", "full", False), ("cached", "fast", True)):
            found = seconds(load, check, cached=cached, repetitions=settings.repetitions)
            result[f"{name} {label}"] = {"wall": found.wall - without.wall, "cpu": found.cpu - without.cpu}
    print(json.dumps(result, indent=2))
    if settings.json:
        files.write_json(settings.json, result)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(tyro.cli(Settings, description=__doc__))
