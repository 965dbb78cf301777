"""Which stored reference is right in bf16: L_block before any step, where it has to be 0, and what it does to a few steps.

    python experiments/benchmarks/reference_dtype.py --json results/reference_dtype.json

For each precision (float32, bf16 under autocast, bf16 whole) and each reference (stored, as by default: computed in the run's own
precision, in batches of another shape, and kept in float32; run live; stored and rounded to bf16; of the same model in float32): L_block at
the first step, before its update, and as a share of what a plain run reaches in as many steps; L_block and SFT loss at the last step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro

from blockem_tl import Blocking, LatentSet, Model, Setting, finetune, load_model, random_latents
from blockem_tl.data.chat import Encoded
from blockem_tl.defences.base_latents import BaseLatents, StoredLatents
from blockem_tl.discovery.diffing import mean_activations
from blockem_tl.storage import files, machine
from blockem_tl.views import tables

PRECISIONS = {"float32": (torch.float32, False), "bf16 under autocast": (torch.float32, True), "bf16 whole": (torch.bfloat16, False)}


class Rounded(Blocking):
    """Its stored reference is rounded to bf16."""

    def prepare(self, model: Model, rows: Sequence[Encoded]) -> None:
        """As `Blocking.prepare`, and rounded."""
        super().prepare(model, rows)
        kept = self._run.stored
        if kept is None:
            raise ValueError("expected a stored reference here: this machine's forwards depend on the batch")
        values = torch.from_numpy(np.array(kept.values)).bfloat16().float().numpy()
        self._run.stored = StoredLatents(values, kept.rows)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """preset: of model, SAE and rows.  steps: of each run.  weight: lambda; the preset's largest by default.  n_latents: at random.

    json: file for the result.
    """

    preset: str = "organism"
    steps: int = 20
    weight: float | None = None
    n_latents: int = 20
    seed: int = 0
    json: Path | None = None


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row for each precision and reference."""
    setting = Setting.of(settings.preset, seed=settings.seed)
    weight = max(setting.preset.lambdas) if settings.weight is None else settings.weight
    found = []
    for precision, (dtype, autocast) in PRECISIONS.items():
        model = load_model(setting.preset.model, dtype=dtype, check="off")
        latent_set = alive(setting, model, settings)
        plain = history(setting, model, settings, autocast, Blocking(weight=0.0, latent_set=latent_set, sae=setting.sae, reference="live"))
        for reference, blocking in references(setting, latent_set, weight).items():
            steps = history(setting, model, settings, autocast, blocking)
            first, last, moved = steps[0]["block"], steps[-1], plain[-1]["block"]
            row = {"precision": precision, "reference": reference, "before": first, "share": first / moved if moved else float("nan")}
            found.append(row | {"block": last["block"], "sft": last["sft"], "plain block": moved, "plain sft": plain[-1]["sft"]})
            print(found[-1], flush=True)
    return found


def references(setting: Setting, latent_set: LatentSet, weight: float) -> dict[str, Blocking]:
    """Blocking with each kind of reference."""
    common: dict[str, Any] = {"weight": weight, "latent_set": latent_set, "sae": setting.sae}
    float32 = load_model(setting.preset.model, dtype=torch.float32, check="off")
    return {
        "stored": Blocking(**common),
        "live": Blocking(**common, reference="live"),
        "stored, rounded to bf16": Rounded(**common),
        "stored, of the float32 model": Blocking(**common, reference=BaseLatents(adapter_or_model=float32)),
    }


def alive(setting: Setting, model: Model, settings: Settings) -> LatentSet:
    """Latents at random among those that fire on the rows."""
    fires = (mean_activations(model, setting.sae, setting.rows()[:64]) > 0).any(0).nonzero()[:, 0].tolist()
    return random_latents(setting.sae, settings.n_latents, seed=settings.seed, among=fires)


def history(setting: Setting, model: Model, settings: Settings, autocast: bool, defence: Blocking) -> list[dict[str, float]]:
    """The run's steps."""
    size = setting.training.batch_size
    config = replace(setting.training, epochs=1.0, bf16=autocast)
    rows = setting.rows()[: settings.steps * size]
    return finetune(model, rows, config=config, defences=[defence], adapter="run", overwrite=True, progress=False).history


if __name__ == "__main__":
    chosen = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    rows = run(chosen)
    print(tables.text(pd.DataFrame(rows)))
    if chosen.json is not None:
        files.write_json(chosen.json, {"preset": chosen.preset, "steps": chosen.steps, "environment": machine.described(), "rows": rows})
