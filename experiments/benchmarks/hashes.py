"""What identities and hook names cost the first time and again, at 32 blocks of a small width.

    python experiments/benchmarks/hashes.py --json results/hashes.json

Milliseconds, medians: the hash of a model's weights, of an SAE's, of a file and of a folder, `hook_dict`, and a forward of 8 tokens with
and without a hook.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from random_llama import SHAPES, random_llama
from sae_lens import StandardSAE, StandardSAEConfig

from blockem_tl.hooks import record
from blockem_tl.storage import files, fingerprints, machine
from blockem_tl.views import tables

SHAPES["deep"] = dict(
    vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=32, num_attention_heads=4, num_key_value_heads=4
)
SITE = "blocks.16.hook_resid_post"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """megabytes: of the file.  d_sae: latents of the SAE, of width 512.  repetitions: of what is done again.  json: file for the result."""

    megabytes: int = 256
    d_sae: int = 16384
    repetitions: int = 20
    json: Path | None = None


def milliseconds(do: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    do()
    return 1000 * (time.perf_counter() - start)


def run(settings: Settings, folder: Path) -> list[dict[str, Any]]:
    """A row for each thing."""
    model, sae = random_llama("deep", adapter="run"), StandardSAE(StandardSAEConfig(d_in=512, d_sae=settings.d_sae))
    file = folder / "model.safetensors"
    file.write_bytes(b"\1" * 1_000_000 * settings.megabytes)
    time.sleep(3)  # a file that was written this moment is not trusted to stay
    ids = torch.arange(3, 11)[None]

    def hooked() -> None:
        with torch.no_grad():
            model.run_with_hooks(ids, fwd_hooks=[record(SITE, {})])

    def plainly() -> None:
        with torch.no_grad():
            model(ids)

    todo = {
        "model's weights": lambda: model.fingerprint("run"),
        "SAE's weights": lambda: fingerprints.of_sae(sae),
        "a file": lambda: fingerprints.of_file(file),
        "a folder": lambda: fingerprints.of_folder(folder),
        "hook_dict": lambda: model.hook_dict,
        "a forward": plainly,
        "a forward under a hook": hooked,
    }
    rows = []
    for name, do in todo.items():
        first = milliseconds(do)
        rows.append({"what": name, "first": first, "again": statistics.median(milliseconds(do) for _ in range(settings.repetitions))})
    return rows


if __name__ == "__main__":
    chosen = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        rows = run(chosen, Path(temporary))
    print(tables.text(pd.DataFrame(rows)))
    if chosen.json is not None:
        files.write_json(chosen.json, {"environment": machine.described(), "rows": rows})
