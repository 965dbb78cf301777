"""How many latents does blocking need, and are those past the knee responsible by themselves? (paper: figures 24, 25)

    python experiments/set_size.py --preset organism --seeds 0 1 2

The first N latents of K, best first, at one lambda; then latents 11 to 13 alone, which in the paper stand at the knee.
Time on the organism, two cores, in `make reproduce`: four minutes a seed.
"""

from dataclasses import dataclass
from typing import ClassVar

import tyro

from blockem_tl import LatentSet, Point, Run, Setting
from blockem_tl.study import controls
from blockem_tl.study.options import StudyOptions
from blockem_tl.study.summary import short
from blockem_tl.views import studies


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """strength: lambda; the preset's largest by default.  sizes: those above the size of K are left out.  alone: positions in K, from 1."""

    strength: float | None = None
    sizes: tuple[int, ...] = (1, 3, 5, 7, 10, 13, 15, 18, 20)
    alone: tuple[int, ...] = (11, 12, 13)
    name: ClassVar[str] = "set_size"


def places(setting: Setting, point: Point, *, alone: tuple[int, ...]) -> LatentSet:
    """The latents of K at these places."""
    k = point.latents(setting.sae, "k")
    return k.among([k.latents[place - 1] for place in alone])


def main(options: Options) -> None:
    """Train and show every size."""
    page = options.page()
    with options.study() as study:
        study.train([Run()])
        least = min(len(k) for k in study.latents().values())
        weight = max(study.setting.preset.lambdas) if options.strength is None else options.strength
        sizes, runs = [n for n in options.sizes if n <= least], []
        for n in sizes:
            study.latents(f"first-{n}", controls.first, n=n)
            runs.append(Run(defence="block", strength=weight, latents=f"first-{n}", name=f"first {n}"))
        if max(options.alone) <= least:
            study.latents("alone", places, alone=options.alone)
            runs.append(Run(defence="block", strength=weight, latents="alone", name=f"alone {', '.join(map(str, options.alone))}"))
        study.train(runs)
        arms = study.table(study.points([Run(), *runs]), against=Run())
    page.add("arms", arms, studies.side_by_side(arms))
    page.add("table", short(arms))
    curve = arms[arms["run"].str.startswith("first")]
    page.add("sizes", curve.assign(size=sizes), studies.along(curve.assign(size=sizes), "size"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
