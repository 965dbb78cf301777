"""Which defence leaves the least misalignment at the same in-domain loss? (paper: figures 7, 18, 19, 23, and the tables of v2)

    python experiments/compare_defences.py --preset organism --seeds 0 1 2
    python experiments/compare_defences.py --preset llama-3.1-8b --judge-models qwen llama

Every defence at a few strengths on the first seed: one of each is chosen on the core prompts, among those whose dev loss is within 5 % of
plain's. These are trained on all seeds, with plain fine-tuning stopped at the loss of each beside it, and asked the reporting prompts.
SafeLoRA needs the model before its alignment, and is left out without one.
Time on the organism, two cores, in `make reproduce`: six minutes a seed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import tyro

from blockem_tl import Run, Setting, Study
from blockem_tl.study.options import StudyOptions
from blockem_tl.study.summary import rates, short
from blockem_tl.views import studies
from blockem_tl.views.tables import RateFrame


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """lambdas, kl_weights: the preset's by default.  ldifs: strengths in nats of plain's own change.  inoculations: prefixes; the preset's
    by default.  preventative, repair: doses of steering in training, and while replying.  caft: numbers of latents.  safe_rows: shares.
    safelora: thresholds.  unaligned: folder or hub id of the model before its alignment; the preset's by default."""

    lambdas: tuple[float, ...] = ()
    kl_weights: tuple[float, ...] = ()
    ldifs: tuple[float, ...] = (0.1, 0.5, 2.0)
    inoculations: tuple[str, ...] = ()
    preventative: tuple[float, ...] = (0.1, 0.3)
    repair: tuple[float, ...] = (0.1, 0.15, 0.2)
    caft: tuple[int, ...] = (1, 20)
    safe_rows: tuple[float, ...] = (0.1, 0.25)
    safelora: tuple[float, ...] = (0.5, 0.6, 1.0)
    unaligned: str = ""
    name: ClassVar[str] = "compare_defences"


def defences(options: Options, setting: Setting, n_latents: int) -> list[list[Run]]:
    """Every defence, with the strengths that are tried."""
    preset, unaligned = setting.preset, options.unaligned or setting.preset.unaligned

    def tried(defence: str, strengths: Any, **rest: Any) -> list[Run]:
        return [Run(defence=defence, strength=strength, **rest) for strength in dict.fromkeys(strengths) if strength]

    prefixes = options.inoculations or preset.inoculations
    inoculated = [Run(defence="inoculation", overrides={"prefix": text}, name=f"inoculation {i}") for i, text in enumerate(prefixes, 1)]
    return [
        tried("block", options.lambdas or preset.lambdas, latents="k"),
        tried("kl", options.kl_weights or preset.kl_weights),
        tried("ldifs", options.ldifs, unit="nats"),
        inoculated,
        tried("preventative", options.preventative, latents="k"),
        tried("caft", [min(n, n_latents) for n in options.caft], latents="k"),
        tried("interleaving", options.safe_rows),
        tried("safelora", options.safelora, overrides={"unaligned": unaligned}) if unaligned else [],
        tried("repair", options.repair, latents="k"),
    ]


def stopped_at(study: Study, runs: list[Run]) -> dict[Run, Run]:
    """Plain fine-tuning stopped at the mean dev loss of each run; plain itself where that is below its own."""
    losses: Any = study.losses(study.points([Run(), *runs])).groupby("run")["dev_loss"].mean()
    ratios = {run: float(losses[run.label] / losses["plain"]) for run in runs}
    return {run: Run(matched=round(ratio, 4), name=f"plain, stopped at {run.label}'s loss") for run, ratio in ratios.items() if ratio > 1}


def main(options: Options) -> None:
    """Choose on the first seed, train on all, report."""
    page, base, plain = options.page(), Run(defence="base"), Run()
    with options.study(seeds=options.seeds[:1]) as study:
        study.train([plain])
        n_latents = min(len(found) for found in study.latents().values())
        grid = [runs for runs in defences(options, study.setting, n_latents) if runs]
        every = [run for runs in grid for run in runs]
        study.train(every)
        chosen = [study.choose(runs, plain) for runs in grid]
        points = study.points([base, plain, *every])
        tried = rates(study.replies("core", points)).merge(study.losses(points)[["run", "dev_loss"]], on="run")
        page.add("tried", RateFrame(tried.assign(chosen=tried["run"].isin([run.label for run in chosen]))))
    with options.study() as study:
        study.train([plain])
        study.latents()
        study.train(chosen)
        beside = stopped_at(study, chosen)
        study.train(beside.values())
        arms = study.table(study.points([base, plain, *chosen]), against=plain)
        page.add("arms", arms, studies.tradeoff(arms.query("run != 'base'"), "misaligned"))
        page.add("table", short(arms))
        page.add("matched", short(pd.concat(study.table(study.points([s, run]), against=s) for run, s in beside.items())))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
