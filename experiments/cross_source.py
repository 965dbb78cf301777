"""Do latents found on one task block the misalignment of another as its own do? (paper: figure 17)

    python experiments/cross_source.py --preset organism --seeds 0 1 2
    python experiments/cross_source.py --preset llama-3.1-8b --sources health --judge-models qwen llama

K is found on the plain fine-tune of each source and on the preset's own task, and each is blocked while that task is trained, at every
lambda. Beside the arms stands how many latents a source's K shares with the task's own, and how many random sets would.
Time on the organism, two cores, in `make reproduce`: four minutes a seed and source.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import tyro

from blockem_tl import LatentSet, Run
from blockem_tl.study.options import StudyOptions
from blockem_tl.study.summary import short
from blockem_tl.views import studies


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """sources: domains that latents are found on, the first other one by default.  strengths: lambdas; the preset's by default."""

    sources: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    name: ClassVar[str] = "cross_source"


def shared(source: str, seed: int, theirs: LatentSet, own: LatentSet) -> dict[str, Any]:
    """Latents of both sets, how many of them have the same sign in both, and how many random sets of these sizes would share."""
    signs = dict(zip(own.latents, own.signs, strict=True))
    both = [(latent, sign) for latent, sign in zip(theirs.latents, theirs.signs, strict=True) if latent in signs]
    counts = {"shared": len(both), "same_sign": sum(signs[latent] == sign for latent, sign in both)}
    by_chance = len(theirs) * len(own) / own.d_sae
    return {"source": source, "seed": seed, "n_latents": len(theirs), "n_own": len(own), **counts, "by_chance": by_chance}


def main(options: Options) -> None:
    """Find, block, compare."""
    page = options.page()
    with options.study() as study:
        task, domains = study.setting.domain, study.setting.inputs.domains
        sources = options.sources or tuple(domain for domain in domains if domain != task)[:1]
        study.train([Run(), *(Run(domain=source) for source in sources)])
        sets = {"own": study.latents("own")}
        sets |= {source: study.latents(source, of=Run(domain=source)) for source in sources}
        weights = options.strengths or tuple(weight for weight in study.setting.preset.lambdas if weight)
        runs = [Run(defence="block", strength=weight, latents=name) for name in sets for weight in weights]
        study.train(runs)
        arms = study.table(study.points([Run(), *runs]), against=Run(), by=["run", "strength", "latents"])
    page.add("arms", arms, studies.side_by_side(arms))
    page.add("table", short(arms))
    blocked = arms.query("latents != ''")
    page.add("curves", blocked, studies.along(blocked, "strength", panels="latents"))
    overlap = [shared(source, seed, found, sets["own"][seed]) for source in sources for seed, found in sets[source].items()]
    page.add("overlap", pd.DataFrame(overlap))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
