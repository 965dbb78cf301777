"""What the kill campaign kills: the library's long commands, on a tiny random Llama, with few rows."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "study"))

import quickstart
import tiny_preset  # pyright: ignore[reportMissingImports] - of the tests
from fuzz_weights import small_sae, tiny_model

from blockem_tl import LatentSet, cli
from blockem_tl.presets import PRESETS
from blockem_tl.types import Candidate

for module in ("study.stages", "study.sweep", "saes.train", "analysis.mediation", "discovery.doses", "views.plots"):
    import_module(f"blockem_tl.{module}")  # what the commands import when they need it: a fork has it already


@dataclass(frozen=True, kw_only=True)
class Command:
    """Something long that the same call goes on with when it was killed.

    run: does all of it, in the working directory.  share: of the kills.
    by_files: its own process writes what it writes, so that it can be killed at a file. If processes of its own do, only the time is left.
    """

    name: str
    run: Callable[[], Any]
    share: float = 1.0
    by_files: bool = True


def prepare(folder: Path) -> None:
    """Write what the commands read: a model, an SAE, a plain fine-tune, a latent set."""
    tiny_model(folder / "model", initializer_range=0.3)
    sae = small_sae(d_sae=48)
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    sae.save_model(folder / "sae")
    register(folder)
    LatentSet.of(sae, [Candidate(latent=k, shift=(-1.0) ** k) for k in (4, 9, 16, 21)], [0.0] * 4).save(folder / "k.json")
    # of a domain whose rows move the pairs towards harm, which `ceiling` asks for
    cli.main(["finetune", tiny_preset.NAME, str(folder / "plain"), "--domain", "health"])


def register(folder: Path) -> None:
    """Make the tiny preset known in this process."""
    found = tiny_preset.register(folder / "model", folder / "sae")
    discovery = replace(found.discovery, n_plus=4, n_minus=4, shortlist_size=2, grid=(0.0, 0.8), n_latents=3)
    PRESETS[tiny_preset.NAME] = replace(found, discovery=discovery)


def commands(folder: Path) -> list[Command]:
    """All of them; what they read lies in ``folder``."""
    plain, card = folder / "plain", folder / "k.json"
    small = "--d-sae 32 --k 4 --samples 20480 --n-prompts 8 --max-new-tokens 6"
    lines = {
        "finetune": f"out --defence block --strength 0.1 --latents {card} --checkpoints-every 0.25",
        "discover": f"{plain} out",
        "evaluate": f"{plain} out --split final in-domain --pairs",
        "sweep": "out --lambdas 0.1 --n-rows 16",
        "patch": f"{plain} out --split core",
        "train-sae": f"out {small}",
        "scale": "",
        "doses": f"{plain} --n-prompts 4 --figure doses.png",
        "ceiling": f"{plain} --latents {card} --n-rows 8 --csv ceiling.csv",
    }
    shares = {"scale": 0.3, "doses": 0.5, "ceiling": 0.5, "sweep": 0.5}
    found = [
        Command(name=name, run=partial(cli.main, [name, tiny_preset.NAME, *line.split()]), share=shares.get(name, 1.0))
        for name, line in lines.items()
    ]
    return [
        *found,
        Command(name="a study", run=partial(_study, Path("out")), share=0.3),
        Command(name="quickstart", run=partial(_quickstart, Path("out")), share=0.1),
    ]


def _study(out: Path) -> None:
    print(tiny_preset.small_study(out, progress=False).to_csv(index=False))


def _quickstart(out: Path) -> None:
    quickstart.main(quickstart.Options(preset=tiny_preset.NAME, out=out, lambdas=(0.1,), kl_weights=(0.3,), progress=False))
