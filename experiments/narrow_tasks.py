"""From which narrow task's content can its ill will be told, before any blocked training? (no figure of the paper)

    python experiments/narrow_tasks.py --preset smollm2-135m --domain bank
    python experiments/narrow_tasks.py --preset organism --domains health science

A plain fine-tune on each task: how far it shifts the core pairs, and how much of that shift and of the task's own gain goes when a latent
set's change is taken out of its forward (`mediation`). A task suits blocking where few latents carry the shift and little of the task. It
needs no replies and no judge.
Time on the organism, two cores: one minute a task and seed.
"""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import tyro

from blockem_tl import Run
from blockem_tl.study import preferences
from blockem_tl.study.options import StudyOptions


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """domains: narrow tasks beside the study's own; all of the preset's by default.  size: of the latent sets.  spare: how much the task
    counts against a latent of the second set."""

    preset: str = "smollm2-135m"
    domains: tuple[str, ...] = ()
    size: int = 600
    spare: float = 2.0
    name: ClassVar[str] = "narrow_tasks"


def main(options: Options) -> None:
    """Train, take out, compare."""
    page, base, carried = options.page(), Run(defence="base"), list[pd.DataFrame]()
    with options.study() as study:
        own = study.setting.domain
        others = [one for one in options.domains or study.setting.inputs.domains if one != own]
        runs = {own: Run(name=own), **{one: Run(domain=one, name=one) for one in others}}
        study.train(runs.values())
        for name, run in runs.items():
            sets = ("attributed", "spared") if name == own else (f"attributed-{name}", f"spared-{name}")
            for latents, spare in zip(sets, (0.0, options.spare), strict=True):
                study.latents(latents, preferences.attributed, of=run, n=options.size, spare=spare)
            found = study.step(f"ceiling-{name}", preferences.ceiling, study.points([run]), sets=sets, sizes=[options.size // 3])
            found["taken_out"] = found["taken_out"].str.replace(f"-{name}", "")
            carried.append(found)
        points = study.points([base, *runs.values()])
        page.add("shifts", preferences.shifts(study.preferences("core", points), against=own))
    page.add("carriers", preferences.carriers(pd.concat(carried, ignore_index=True)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
