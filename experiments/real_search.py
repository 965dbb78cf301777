"""What does blocking a real model take: which latents, how many, where, how strongly, and training what? (no figure of the paper)

    python experiments/real_search.py --preset smollm2-135m --domain cars

Each arm differs from the first in one choice and trains until it knows the task as plain does. Harm is the margin of the dev pairs, which
choose and report nothing, so one seed will do; it needs no judge.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import tyro

from blockem_tl import Run, Study
from blockem_tl.study import controls, preferences
from blockem_tl.study.options import StudyOptions


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """nats: the first arm's strength.  size: of its K.  others: further strengths.  fewer: further sizes.  group: latents that mediation
    takes at a time, for a set of the least size.  matched, longest: times plain's dev loss, and epochs, where an arm stops."""

    preset: str = "smollm2-135m"
    nats: float = 135.0
    size: int = 600
    others: tuple[float, ...] = (5.0, 45.0, 405.0)
    fewer: tuple[int, ...] = (60, 200)
    group: int = 20
    matched: float = 1.03
    longest: float = 1.6
    name: ClassVar[str] = "real_search"


def sets(study: Study, options: Options) -> dict[str, str]:
    """The latent sets besides the first, all found on the core pairs: by what each is."""
    study.latents("attributed", preferences.attributed, n=options.size, spare=0.0)
    study.latents("spared", preferences.attributed, n=options.size, spare=2.0)
    study.latents("shifted", preferences.shifted, n=options.size)
    study.latents("attributed-random", controls.random_beside, beside="attributed")
    for n in options.fewer:
        study.latents(f"k{n}", preferences.attributed, n=n)
    least = min(options.fewer)
    study.latents(f"mediated{least}", preferences.mediated, n=least, beside="attributed", group=options.group)
    found = {
        "attributed, sparing the task": "spared",
        "by the shift (eq. 5)": "shifted",
        "at random": "attributed-random",
        f"{least}, by mediation": f"mediated{least}",
    }
    return found | {f"first {n} attributed": f"k{n}" for n in options.fewer}


def arms(options: Options, latents: dict[str, str]) -> list[Run]:
    """The first arm, and those that differ from it in one choice."""
    usual: dict[str, Any] = {"epochs": options.longest, "positions": "all", "reference": "live"}
    first = Run(
        defence="block", strength=options.nats, unit="nats", latents="attributed", matched=options.matched, overrides=usual, name="first"
    )
    chosen = [replace(first, latents=name, name=f"latents: {what}") for what, name in latents.items()]
    stronger = [replace(first, strength=nats, name=f"strength: {nats:g} nats") for nats in options.others]
    changes: dict[str, dict[str, Any]] = {
        "positions: completions": {"positions": "completion"},
        "reference: stored": {"reference": "stored"},
        "training: all blocks": {"up_to_block": None},
        "the SAE's error anchored": {"error_anchor": 1.0},
    }
    other = [replace(first, overrides=usual | change, name=what) for what, change in changes.items()]
    return [first, *chosen, *stronger, *other]


def main(options: Options) -> None:
    """Find the sets, train, compare on the dev pairs."""
    page, base = options.page(), Run(defence="base")
    with options.study() as study:
        study.train([Run()])
        runs = arms(options, sets(study, options))
        study.train(runs)
        points = study.points([base, Run(), *runs])
        page.add("arms", preferences.table(study.preferences("dev", points), study.losses(points), against="plain"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
