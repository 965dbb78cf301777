"""Does blocking at the model's last block work as well as in the middle? (paper: figure 27, E.3)

    python experiments/last_layer.py --preset organism --seeds 0 1 2
    python experiments/last_layer.py --preset llama-3.1-8b --judge-models qwen llama

The whole method twice: at the preset's site, and, under a preset of its own with the SAE there, at the last block's output: latents are
found anew, and every lambda of either preset is blocked. Nothing is chosen. Lambdas of two sites do not compare, since the penalty grows
with the square of the activations: compare what the best of them leave, at the loss that they cost. The Llama preset's SAE at the last
block was trained on the base model, not on the instruct model.
Time on the organism, two cores, in `make reproduce`: three minutes a seed.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd
import tyro

from blockem_tl import Run
from blockem_tl.study.options import StudyOptions
from blockem_tl.study.summary import short
from blockem_tl.views import studies
from blockem_tl.views.tables import RateFrame


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """last_preset: the one at the last block, PRESET-last-layer by default.  lambdas, last_lambdas: the presets' by default."""

    last_preset: str = ""
    lambdas: tuple[float, ...] = ()
    last_lambdas: tuple[float, ...] = ()
    name: ClassVar[str] = "last_layer"


def sweep(options: StudyOptions, lambdas: tuple[float, ...]) -> pd.DataFrame:
    """Plain and blocked fine-tuning at one preset's site."""
    with options.study() as study:
        study.train([Run()])
        study.latents()
        runs = [Run(defence="block", strength=weight, latents="k") for weight in lambdas or study.setting.preset.lambdas if weight]
        study.train(runs)
        points = study.points([Run(), *runs])
        return study.table(points, against=Run(), by=["run", "strength"]).assign(site=study.setting.site)


def main(options: Options) -> None:
    """Both sweeps, side by side."""
    preset = options.last_preset or f"{options.preset}-last-layer"
    last = replace(options, preset=preset, out=options.folder / "last", shared_study=None)  # a study of its own
    last.setting()  # it may be unknown
    page = options.page()
    arms = pd.concat([sweep(options, options.lambdas), sweep(last, options.last_lambdas)], ignore_index=True)
    page.add("arms", RateFrame(arms), studies.along(arms, "strength", panels="site"))
    page.add("table", short(arms))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
