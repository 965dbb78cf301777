"""What does blocking reach on a real model, beside what the latents carry at most and what rival defences reach? (no figure of the paper)

    python experiments/real.py --preset smollm2-135m --domain cars --seeds 0 1 2 --nats 5 15 45 135 --anchor-nats 5 15 45

Without replies and judge: harm is the margin of contrastive pairs. Arms train until their dev loss is within 3 % of plain's. Latents are
chosen by attribution on core pairs, strengths by the first seed's dev pairs and rows; the final pairs of all seeds report.
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import tyro

from blockem_tl import Run, Study
from blockem_tl.study import controls, preferences, summary
from blockem_tl.study.options import StudyOptions

SETS = ("attributed", "spared")  # apart from the sets of other scripts in a study that they share


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """size: of K.  spare: how much the task counts against a latent of spared.  nats, anchor_nats, kl_nats: strengths of blocking, of
    anchors (the SAE's error is one) and of KL, in the cost of plain's own change.  doses: of steering.  matched, longest: times plain's dev
    loss, and epochs, where an arm stops.  report: defences trained on all seeds, all by default.  replies: prompts also answered."""

    preset: str = "smollm2-135m"
    size: int = 600
    spare: float = 2.0
    nats: tuple[float, ...] = (45.0,)
    anchor_nats: tuple[float, ...] = (5.0,)
    kl_nats: tuple[float, ...] = (1.0, 5.0)
    doses: tuple[float, ...] = (0.1, 0.2, 0.4)
    matched: float = 1.03
    longest: float = 1.6
    report: tuple[str, ...] = ()
    replies: int = 0
    name: ClassVar[str] = "real"


def arms(options: Options, site: str) -> Any:
    """Every defence, with the strengths that are tried."""
    train, nats, k, stopped = {"epochs": options.longest}, options.anchor_nats, SETS[0], partial(Run, matched=options.matched)
    everywhere, block = {**train, "positions": "all"}, {**train, "positions": "all", "reference": "live"}
    anchored, priced = {**block, "error_anchor": 1.0}, partial(stopped, unit="nats")
    return {
        "plain, stopped": [stopped()],
        "plain, as long": [Run(overrides=train)],
        "blocked": [priced(defence="block", strength=s, latents=k, overrides=block) for s in options.nats],
        "error anchored": [priced(defence="block", strength=s, latents=k, overrides=anchored) for s in nats],
        "residual anchor": [priced(defence="ldifs", strength=s, overrides={**everywhere, "sites": (site,)}) for s in nats],
        "LDIFS, all blocks": [priced(defence="ldifs", strength=s, overrides=everywhere) for s in nats],
        "KL": [priced(defence="kl", strength=s, overrides=train) for s in options.kl_nats],
        "safe rows": [stopped(defence="interleaving", strength=0.3, overrides=train)],
        "CAFT": [stopped(defence="caft", strength=min(20, options.size), latents=k, overrides=train)],
        "steered while replying": [Run(defence="repair", strength=x, latents=k, overrides={"combine": "sum"}) for x in options.doses],
    }


def titled(run: Run, name: str) -> Run:
    """The run by its defence's name, strength and latents: "blocked, 5, attributed"."""
    return replace(run, name=", ".join(part for part in (name, f"{run.strength:g}" if run.strength else "", run.latents) if part))


def train(study: Study, options: Options, runs: Any) -> None:
    """Plain fine-tunes and latent sets of every seed, then the runs."""
    study.train([Run()])
    for name, spare in zip(SETS, (0.0, options.spare), strict=True):
        study.latents(name, preferences.attributed, n=options.size, spare=spare)
    study.latents("attributed-random", controls.random_beside, beside=SETS[0])
    study.train(runs)


def main(options: Options) -> None:
    """Choose on the first seed, train all, look at the final pairs."""
    page, base = options.page(), Run(defence="base")
    with options.study(seeds=options.seeds[:1]) as study:
        tried = arms(options, study.setting.site)
        train(study, options, itertools.chain(*tried.values()))
        chosen = {name: study.choose(runs, Run(), by="pairs", within=1.05) for name, runs in tried.items()}
        chosen |= {f"{of} at random": replace(chosen[of], latents="attributed-random") for of in ("blocked", "error anchored")}
        points = study.points([base, Run(), *itertools.chain(*tried.values())])
        page.add("tried", preferences.table(study.preferences("dev", points), study.losses(points), against="plain"))
    reported = {name: titled(chosen[name], name) for name in options.report or chosen}
    with options.study() as study:
        train(study, options, reported.values())
        points, sizes = study.points([base, Run(), *reported.values()]), [options.size // 3]
        page.add("ceiling", preferences.carriers(study.step("ceiling", preferences.ceiling, study.points([Run()]), sets=SETS, sizes=sizes)))
        page.add("arms", preferences.table(study.preferences("final", points), study.losses(points), against="plain"))
        page.add("lead", preferences.lead(study.preferences("final", points), reported.get("blocked", Run()).label, against="plain"))
        page.add("in-domain", preferences.table(study.preferences("in-domain", points), study.losses(points), against="plain"))
        page.add("taught", preferences.table(study.step("taught", preferences.taught, points), study.losses(points), against="plain"))
        if options.replies:
            page.add("replies", summary.short(study.table(points, against=Run(), n=options.replies)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
