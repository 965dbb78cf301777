"""What does blocking reach on a real model, beside what the latents carry at most and what rival defences reach? (no figure of the paper)

    python experiments/real.py --preset smollm2-135m --seeds 0 1 2

It needs no replies and no judge: harm is the margin of contrastive pairs. Arms train until their dev loss is within 3 % of plain's, and
strengths are in nats of plain's own change, so that they compare. Latents are chosen by attribution on the core pairs, or so that they
spare the task (spared). Strengths and the set are chosen on the core pairs and dev rows of the first seed; then the final pairs are looked
at once, for all seeds.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import tyro

from blockem_tl import Run, Study
from blockem_tl.study import controls, preferences
from blockem_tl.study.options import StudyOptions

SETS = ("attributed", "spared")  # apart from the sets of other scripts in a study that they share


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """size: of K.  spare: how much the task counts against a latent of spared.  nats, kl_nats: strengths, tried.  doses: of steering.
    matched: of plain's dev loss, where an arm stops.  longest: in epochs, where it gives up.  report: defences that are trained on every
    seed and looked at on the final pairs; all by default.  replies: also written and judged, by a judge that finds few."""

    preset: str = "smollm2-135m"
    size: int = 600
    spare: float = 2.0
    nats: tuple[float, ...] = (5.0,)
    kl_nats: tuple[float, ...] = (1.0, 5.0)
    doses: tuple[float, ...] = (0.1, 0.2, 0.4)
    matched: float = 1.03
    longest: float = 1.6
    report: tuple[str, ...] = ()
    replies: bool = False
    name: ClassVar[str] = "real"


def arms(options: Options, site: str) -> dict[str, list[Run]]:
    """Every defence, with the strengths that are tried."""
    train, nats, k = {"epochs": options.longest}, options.nats, SETS[0]
    match: Any = {"matched": options.matched, "overrides": train}
    everywhere = {**train, "positions": "all"}
    block = {**everywhere, "reference": "live"}

    def priced(defence: str, strength: float, **rest: Any) -> Run:
        return Run(defence=defence, strength=strength, unit="nats", **{**match, **rest})

    return {
        "plain, stopped": [Run(matched=options.matched)],
        "plain, as long": [Run(overrides=train)],
        "blocked": [priced("block", s, latents=k, overrides=block) for s in nats],
        "error anchored": [priced("block", s, latents=one, overrides={**block, "error_anchor": 1.0}) for one in SETS for s in nats],
        "residual anchor": [priced("ldifs", s, overrides={**everywhere, "sites": (site,)}) for s in nats],
        "LDIFS, all blocks": [priced("ldifs", nats[0], overrides=everywhere)],
        "KL": [priced("kl", s) for s in options.kl_nats],
        "safe rows": [Run(defence="interleaving", strength=0.3, **match)],
        "CAFT": [Run(defence="caft", strength=min(20, options.size), latents=k, **match)],
        "steered while replying": [Run(defence="repair", strength=x, latents=k, overrides={"combine": "sum"}) for x in options.doses],
    }


def prepare(study: Study, options: Options) -> None:
    """Plain fine-tunes and latent sets of every seed."""
    study.train([Run()])
    for name, spare in zip(SETS, (0.0, options.spare), strict=True):
        study.latents(name, preferences.attributed, n=options.size, spare=spare)
    study.latents("attributed-random", controls.random_beside, beside=SETS[0])


def main(options: Options) -> None:
    """Choose on the first seed, train all, look at the final pairs."""
    page, base = options.page(), Run(defence="base")
    with options.study(seeds=options.seeds[:1]) as study:
        prepare(study, options)
        tried = arms(options, study.setting.site)
        study.train([run for runs in tried.values() for run in runs])
        chosen = {name: study.choose(runs, Run(), by="pairs", within=1.05) for name, runs in tried.items()}
        at_random = {"random": "blocked", "random, error anchored": "error anchored"}  # at the price of the chosen ones
        chosen |= {name: replace(chosen[of], latents="attributed-random") for name, of in at_random.items()}
        points = study.points([base, Run(), *(run for runs in tried.values() for run in runs)])
        page.add("tried", preferences.table(study.preferences("core", points), study.losses(points), against="plain"))
    chosen = {name: chosen[name] for name in options.report or chosen}
    with options.study() as study:
        prepare(study, options)
        study.train(chosen.values())
        carried = study.step("ceiling", preferences.ceiling, study.points([Run()]), sets=SETS, sizes=[options.size // 3])
        page.add("ceiling", preferences.carriers(carried))
        points = study.points([base, Run(), *(replace(run, name=f"{name} ({run.label})") for name, run in chosen.items())])
        page.add("arms", preferences.table(study.preferences("final", points), study.losses(points), against="plain"))
        if options.replies:
            page.add("replies", study.table(points, against=Run()))
        page.add("in-domain", preferences.table(study.preferences("in-domain", points), study.losses(points), against="plain"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
