"""Do source, rule or size of the latent set matter? (paper: D.5, figure 21; its 15 sets)

    python experiments/latent_sets.py --preset organism --seeds 0 1 2
    python experiments/latent_sets.py --preset llama-3.1-8b --reem-strength 3000 --judge-models qwen llama

Shortlists of five sources: plain fine-tuning (own; the paper's Fin), the same ranked by induction alone (indpp), that of another task
(other; Health), with LoRA only up to the site (restricted; MaxLoRA20), long and blocked (reem). Stage 3 ranks the union of all, and of own
and reem, anew on plain fine-tuning, by the default rule and by ValidReduc; sets of each size are blocked at each lambda.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import tyro

from blockem_tl import Run, Study
from blockem_tl.study import controls, reemergence
from blockem_tl.study.options import StudyOptions
from blockem_tl.views import studies
from blockem_tl.views.tables import RateFrame

DEFAULT = {"valid_only": False, "final_score": "both"}
VALIDREDUC = {"valid_only": True, "final_score": "repair"}
SETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "all": (DEFAULT, (20, 30, 40, 60, 100)),
    "all-validreduc": (VALIDREDUC, (20, 30, 42)),
    "own+reem": (DEFAULT, (20, 30, 40, 60, 100)),
    "own+reem-validreduc": (VALIDREDUC, (20, 29)),
}  # the paper's sizes


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """other: the other task; the preset's first other one by default.  reem_strength: lambda of the run that comes back, the preset's
    smallest by default.  reem_epochs: of it.  strengths: lambdas; the preset's by default."""

    other: str = ""
    reem_strength: float | None = None
    reem_epochs: float = 2.0
    strengths: tuple[float, ...] = ()
    name: ClassVar[str] = "latent_sets"


def shortlists(options: Options, study: Study) -> tuple[str, ...]:
    """The five sources' shortlists, as latent sets of the study; their names, own and reem first."""
    setting = study.setting
    weights = [weight for weight in setting.preset.lambdas if weight]
    others = [options.other] if options.other else [domain for domain in setting.inputs.domains if domain != setting.domain]
    if not others:
        raise ValueError(f"latent sets: preset {setting.preset.name!r} has rows of one task, expected another one for its latents")
    study.train([Run()])
    study.latents()
    weight = min(weights) if options.reem_strength is None else options.reem_strength
    long = reemergence.prolonged(setting, options.reem_epochs)
    sources = {
        "own": (Run(), {}),
        "reem": (Run(defence="block", strength=weight, latents="k", overrides=long), {}),
        "indpp": (Run(), {"screen_score": "induction"}),
        "other": (Run(domain=others[0]), {}),
        "restricted": (Run(overrides=setting.up_to_site), {}),
    }
    study.train([run for run, _ in sources.values()])
    whole = {**DEFAULT, "n_latents": 2 * setting.preset.discovery.shortlist_size}
    for name, (run, changes) in sources.items():
        study.latents(f"shortlist-{name}", of=run, **whole, **changes)
    return tuple(f"shortlist-{name}" for name in sources)


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
        sets = made(study, shortlists(options, study))
        weights = options.strengths or tuple(weight for weight in study.setting.preset.lambdas if weight)
        runs = [Run(defence="block", strength=weight, latents=name) for name in sets["latents"] for weight in weights]
        study.train(runs)
        arms = study.table(study.points([Run(), *runs]), against=Run(), by=["run", "strength", "latents"])
    page.add("arms", arms, studies.side_by_side(arms))
    blocked = arms.query("latents != ''").merge(sets, on="latents")
    best = blocked.loc[blocked.groupby("latents", sort=False)["unsafe_reduction"].idxmax()]  # figure 21's points, each at its best lambda
    page.add("sets", RateFrame(best), studies.along(blocked, "strength", panels="latents"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
