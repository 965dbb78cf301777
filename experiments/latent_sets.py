"""Do source, rule or size of the latent set matter? (paper: D.5, figure 21; its 15 sets)

    python experiments/latent_sets.py --preset organism --seeds 0 1 2
    python experiments/latent_sets.py --preset llama-3.1-8b --reem-strength 3000 --judge-models qwen llama

Shortlists of five sources: plain fine-tuning (own; the paper's Fin), the same ranked by induction alone (indpp), that of another task
(other; Health), with LoRA only up to the site (restricted; MaxLoRA20), long and blocked (reem). Stage 3 ranks the union of all, and of own
and reem, anew on plain fine-tuning, by the default rule and by ValidReduc; sets of each size are blocked at each lambda.
Time on the organism, two cores, in `make reproduce`: 17 minutes a seed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import tyro

from blockem_tl import Run, Study
from blockem_tl.study import controls
from blockem_tl.study.sources import DEFAULT, VALIDREDUC, SourceOptions
from blockem_tl.study.summary import short
from blockem_tl.views import studies
from blockem_tl.views.tables import RateFrame

SETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "all": (DEFAULT, (20, 30, 40, 60, 100)),
    "all-validreduc": (VALIDREDUC, (20, 30, 42)),
    "own+reem": (DEFAULT, (20, 30, 40, 60, 100)),
    "own+reem-validreduc": (VALIDREDUC, (20, 29)),
}  # the paper's sizes


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """strengths: lambdas; the preset's by default."""

    strengths: tuple[float, ...] = ()
    name: ClassVar[str] = "latent_sets"


def made(study: Study, names: tuple[str, ...]) -> pd.DataFrame:
    """The sets that D.5 asks for: latents, union, size, whether it is its union's smallest or largest; a size it lacks is its whole."""
    found = []
    for union, (rule, sizes) in SETS.items():
        among = names if union.startswith("all") else names[:2]
        most = min(len(k) for k in study.latents(union, among=among, n_latents=max(sizes), **rule).values())
        there = sorted({min(size, most) for size in sizes})
        for size in there:
            study.latents(f"{union}-{size}", controls.first, n=size, beside=union)
            ends = {"smallest": size == there[0], "largest": size == there[-1]}
            found.append({"latents": f"{union}-{size}", "union": union, "size": size, **ends})
    return pd.DataFrame(found)


def main(options: Options) -> None:
    """Build the sets, block each, show them."""
    page = options.page()
    with options.study() as study:
        sets = made(study, options.shortlists(study))
        weights = options.strengths or tuple(weight for weight in study.setting.preset.lambdas if weight)
        runs = [Run(defence="block", strength=weight, latents=name) for name in sets["latents"] for weight in weights]
        study.train(runs)
        arms = study.table(study.points([Run(), *runs]), against=Run(), by=["run", "strength", "latents"])
    page.add("arms", arms, studies.side_by_side(arms))
    blocked = arms.query("latents != ''").merge(sets, on="latents")
    best = blocked.loc[blocked.groupby("latents", sort=False)["unsafe_reduction"].idxmax()]  # figure 21's points, each at its best lambda
    page.add("sets", RateFrame(best), studies.along(blocked, "strength", panels="latents"))
    page.add("table", short(best))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
