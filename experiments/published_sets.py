"""Which latents does each source give, and what does blocking them do? Writes the sets that come with the library. (paper: D.2 to D.5)

    python experiments/published_sets.py --preset organism --seeds 0 1 2 --to latents/organism

Sources: plain fine-tuning, that on another task, LoRA only up to the site, and a long blocked run; each by the default rule and by
ValidReduc. Then the two unions that are the paper's best. Each set is blocked in plain fine-tuning, at the lambda that core prompts choose
for K; its card says what the reporting prompts showed. Time on the organism, two cores: six minutes a seed, after latent_sets.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import tyro

from blockem_tl import LatentSet, Run, Study
from blockem_tl.saes.latent_set import NoLatents
from blockem_tl.study.sources import DEFAULT, VALIDREDUC, SourceOptions
from blockem_tl.study.study import StudyFailed

RULES = {"": DEFAULT, "-validreduc": VALIDREDUC}
RATES = ("misaligned", "incoherent", "adherent")


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """to: a folder for the sets; the one beside the tables by default.  strength: lambda; chosen by default.  size: of single sources'
    sets.  unions: sizes of all sources' ValidReduc and of own and reem's default set."""

    to: Path | None = None
    strength: float | None = None
    size: int = 20
    unions: tuple[int, int] = (42, 100)
    name: ClassVar[str] = "published_sets"


def chosen(study: Study, options: Options) -> float:
    """Lambda."""
    if options.strength is not None:
        return options.strength
    grid = [Run(defence="block", strength=weight, latents="k") for weight in study.setting.preset.lambdas if weight]
    study.train(grid)
    return study.choose(grid, against=Run()).strength


def wanted(study: Study, options: Options) -> dict[str, dict[str, Any]]:
    """Options of `Study.latents` by the set's published name."""
    domain, (most, many), names = study.setting.domain, options.unions, options.shortlists(study)
    sets = {}
    for source, (run, changes) in options.sources(study.setting).items():
        for rule, how in RULES.items():
            title = {"own": domain, "other": run.domain}.get(source, source)
            sets[f"{title}{rule}-{options.size}"] = {"of": run, "n_latents": options.size, **changes, **how}
    sets[f"all-validreduc-{most}"] = {"among": names, "n_latents": most, **VALIDREDUC}
    sets[f"{domain}+reem-{many}"] = {"among": names[:2], "n_latents": many, **DEFAULT}
    return sets


def found(study: Study, sets: dict[str, dict[str, Any]]) -> dict[str, dict[int, LatentSet]]:
    """Every set for every seed, but those whose rule finds no latent on some seed."""
    there = {}
    for name, how in sets.items():
        try:
            there[name] = study.latents(name, **how)
        except StudyFailed as failed:
            if not all(NoLatents.__name__ in error for error in failed.errors.values()):
                raise
            print(f"{name}: no latent qualifies on {len(failed.errors)} of {len(study.seeds)} seeds, so there is no such set")
    return there


def validated(rates: Any, name: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """For a card: what plain fine-tuning and the blocked one did on the reporting prompts, as rate, low and high."""
    of_seed = rates[rates["seed"] == seed].set_index("run")
    shown = {run: {rate: [of_seed.loc[run, f"{rate}{end}"] for end in ("", "_low", "_high")] for rate in RATES} for run in ("plain", name)}
    return {**options, "n": int(of_seed.loc[name, "n"]), "plain": shown["plain"], "blocked": shown[name]}


def main(options: Options) -> None:
    """Find, block, write."""
    page = options.page()
    with options.study() as study:
        study.train([Run()])
        study.latents()
        weight, sets = chosen(study, options), found(study, wanted(study, options))
        runs = [Run(defence="block", strength=weight, latents=name, name=name) for name in sets]
        study.train(runs)
        rates: Any = study.table(study.points([Run(), *runs]), against=Run(), by=["run", "seed"])
    about = {"fine-tuned on": study.setting.domain, "strength": weight, "prompts": "final"}
    for name, of_seeds in sets.items():
        for seed, k in of_seeds.items():
            card = {**k.provenance, "validated": validated(rates, name, seed, about)}
            suffix = "" if seed == options.seeds[0] else f"-seed{seed}"
            replace(k, provenance=card).save((options.to or options.folder / "sets") / f"{name}{suffix}.json")
    keys = zip(rates["run"], rates["seed"], strict=True)
    page.add("sets", rates.assign(latents=[len(sets.get(name, {}).get(seed, ())) for name, seed in keys]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
