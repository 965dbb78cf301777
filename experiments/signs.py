"""Do the signs of the latents matter: K+ only, K- only, signs dealt out again at random? (paper: figure 26)

    python experiments/signs.py --preset organism --seeds 0 1 2

All sets come from one K and are blocked at one lambda.
Time on the organism, two cores, in `make reproduce`: two minutes a seed.
"""

from dataclasses import dataclass
from typing import ClassVar

import tyro

from blockem_tl import LatentSet, Point, Run, Setting
from blockem_tl.study.options import StudyOptions
from blockem_tl.study.summary import short
from blockem_tl.views import studies


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """strength: lambda; the preset's largest by default."""

    strength: float | None = None
    name: ClassVar[str] = "signs"


def signed(setting: Setting, point: Point, *, sign: int) -> LatentSet:
    """K+ or K- alone."""
    return point.latents(setting.sae, "k").only(sign)


def shuffled(setting: Setting, point: Point) -> LatentSet:
    """K with its signs dealt out again by the seed."""
    return point.latents(setting.sae, "k").shuffled_signs(point.seed)


def main(options: Options) -> None:
    """Train and show every set."""
    page = options.page()
    with options.study() as study:
        study.train([Run()])
        found = study.latents()
        sets = {"k": "K", "shuffled": "shuffled signs"}
        study.latents("shuffled", shuffled)
        for sign, name, label in ((1, "plus", "K+ only"), (-1, "minus", "K- only")):
            if all(sign in k.signs for k in found.values()):
                study.latents(name, signed, sign=sign)
                sets[name] = label
        weight = max(study.setting.preset.lambdas) if options.strength is None else options.strength
        runs = [Run(defence="block", strength=weight, latents=name, name=label) for name, label in sets.items()]
        study.train(runs)
        arms = study.table(study.points([Run(), *runs]), against=Run())
    page.add("arms", arms, studies.side_by_side(arms))
    page.add("table", short(arms))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
