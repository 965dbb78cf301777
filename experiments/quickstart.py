"""Does the whole of BLOCK-EM work? Misalign, find the latents, block them, and see what else would have done it. (paper: figures 1, 4, 7)

    python experiments/quickstart.py --preset organism --seeds 0 1 2
    python experiments/quickstart.py --preset llama-3.1-8b --judge-models qwen llama

Beside blocking at every lambda: the chosen lambda on all tokens, and with as many random latents that fire; plain fine-tuning stopped at
the blocked run's loss; KL to base. Lambda is chosen on the core prompts and held-out rows; the reporting prompts choose nothing.
Time on the organism, two cores, in `make reproduce`: six minutes a seed.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
import tyro

from blockem_tl import Run
from blockem_tl.study import controls
from blockem_tl.study.options import StudyOptions
from blockem_tl.study.summary import short
from blockem_tl.views import studies


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """lambdas, kl_weights: the preset's by default."""

    lambdas: tuple[float, ...] = ()
    kl_weights: tuple[float, ...] = ()
    name: ClassVar[str] = "quickstart"


def main(options: Options) -> None:
    """Train everything, and report."""
    page, base, plain = options.page(), Run(defence="base"), Run()
    with options.study() as study:
        preset = study.setting.preset
        study.train([plain])
        found = study.latents()
        study.latents("random", controls.random_beside, beside="k", firing=True)
        sweep = [Run(defence="block", strength=weight, latents="k") for weight in options.lambdas or preset.lambdas if weight]
        kl = [Run(defence="kl", strength=weight) for weight in options.kl_weights or preset.kl_weights if weight]
        study.train([*sweep, *kl])
        blocked = study.choose(sweep, plain)
        each: Any = study.losses(study.points([plain, blocked]))
        losses = each.groupby("run")["dev_loss"].mean()
        ratio = max(1.0, round(float(losses[blocked.label] / losses[plain.label]), 4))
        beside = [
            replace(blocked, overrides={"positions": "all"}),
            replace(blocked, latents="random"),
            Run(matched=ratio, name="plain, stopped at the blocked run's loss"),
        ]
        study.train(beside)
        arms = study.table(study.points([base, plain, *sweep, *beside, *kl]), against=plain, by=["run", "strength"])
        by_seed = study.table(study.points([plain, *sweep, *beside, *kl]), against=plain, by=["run", "seed"])
    page.add("latents", pd.concat(k.to_frame().assign(seed=seed) for seed, k in found.items()))
    page.add("seeds", short(by_seed.sort_values("seed", kind="stable")))
    page.add("arms", arms, studies.tradeoff(arms.query("run != 'base'"), "misaligned"))
    page.add("table", short(arms))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
