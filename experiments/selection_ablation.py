"""Does it matter how the latents are chosen: causally, by shift alone, at random? (paper: figures 20, 21)

    python experiments/selection_ablation.py --preset organism --seeds 0 1 2

Sets of equal size at each lambda: the default rule (equation 9, unfiltered), ValidReduc, IndPP (D.3, D.4), the latents whose means moved
most (top-delta), and random ones among all of the SAE, as in the paper. Where a rule finds fewer than --size, its set is smaller, and the
table says so.
Time on the organism, two cores, in `make reproduce`: six minutes a seed.
"""

from dataclasses import dataclass
from typing import ClassVar

import tyro

from blockem_tl import LatentSet, Point, Run, Setting, random_latents
from blockem_tl.discovery.diffing import candidate_pool, shifts
from blockem_tl.study.options import StudyOptions
from blockem_tl.study.sources import DEFAULT, VALIDREDUC
from blockem_tl.study.summary import short
from blockem_tl.views import studies
from blockem_tl.views.tables import RateFrame


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """strengths: lambdas; the preset's by default.  size: latents of each set."""

    strengths: tuple[float, ...] = ()
    size: int = 20
    name: ClassVar[str] = "selection_ablation"


def top_delta(setting: Setting, point: Point, *, size: int) -> LatentSet:
    """The latents whose means moved most on the core prompts, whatever they do."""
    with setting.model.using(point.adapter):
        shift = shifts(setting.model, setting.sae, setting.prompts("core"))
    pool = sorted(candidate_pool(shift, n_plus=size, n_minus=size), key=lambda latent: -abs(latent.shift))[:size]
    return LatentSet.of(setting.sae, pool, [abs(one.shift) for one in pool], prompts=setting.prompts("core"))


def at_random(setting: Setting, point: Point, *, size: int) -> LatentSet:
    """Latents at random, with random signs."""
    return random_latents(setting.sae, size, seed=point.seed)


def main(options: Options) -> None:
    """Train and show every set at every lambda."""
    page, n = options.page(), options.size
    with options.study() as study:
        study.train([Run()])
        found = {
            "default": study.latents("default", n_latents=n, **DEFAULT),
            "validreduc": study.latents("validreduc", n_latents=n, **VALIDREDUC),
            "indpp": study.latents("indpp", n_latents=n, screen_score="induction", **DEFAULT),
            "top-delta": study.latents("top-delta", top_delta, size=n),
            "at-random": study.latents("at-random", at_random, size=n),
        }
        weights = options.strengths or tuple(weight for weight in study.setting.preset.lambdas if weight)
        runs = [Run(defence="block", strength=weight, latents=name) for name in found for weight in weights]
        study.train(runs)
        arms = study.table(study.points([Run(), *runs]), against=Run(), by=["run", "strength", "latents"])
    sizes = {name: ", ".join(str(len(k)) for k in sets.values()) for name, sets in found.items()}
    arms = RateFrame(arms.assign(sizes=[sizes.get(name, "") for name in arms["latents"]]))
    page.add("arms", arms, studies.side_by_side(arms))
    page.add("table", short(arms))
    blocked = arms.query("latents != ''")
    page.add("curves", blocked, studies.along(blocked, "strength", panels="latents"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
