"""At which block is misalignment decided? Base's states in the fine-tuned model, site by site, judged. (paper: figure 31, and F.1)

    python experiments/patching_sweep.py --preset organism --seeds 0 1 2
    python experiments/patching_sweep.py --preset organism --epochs 4 --strength 1 --freeze-downstream
    python experiments/patching_sweep.py --preset llama-3.1-8b --epochs 2 --strength 3000 --judge-models qwen llama

Patched are every block's output over the prompt (figure 31), and the preset's site while decoding (experiment 2). By default the plain
fine-tune is patched; with --strength also a model that was blocked as long, which has re-emerged if --epochs is large. Replies are kept
site by site. `blockem patch` does the same to an adapter of yours; experiments/real_reemergence.py measures it by pairs.
Time on the organism, two cores, in `make reproduce`: a minute a seed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pandas as pd
import tyro

from blockem_tl import Run, Study
from blockem_tl.study import patching, reemergence
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.options import StudyOptions
from blockem_tl.views import plots


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """strength: lambda of a blocked model that is patched too.  epochs: of training, at a constant rate as in reemergence.py; the preset's
    own training by default.  freeze_downstream: train it with LoRA up to the site alone.  split, when, sites, components, reverse: as for
    `blockem patch`."""

    strength: float | None = None
    epochs: float | None = None
    freeze_downstream: bool = False
    split: PromptSplit = "final"
    when: tuple[Literal["prompt", "decode"], ...] = ("prompt", "decode")
    sites: tuple[str, ...] = ()
    components: bool = False
    reverse: bool = False
    name: ClassVar[str] = "patching_sweep"


def train(study: Study, options: Options) -> list[Run]:
    """The models that are patched."""
    long: dict[str, Any] = {} if options.epochs is None else reemergence.prolonged(study.setting, options.epochs)
    runs = [Run(overrides=long, name="plain")]
    if options.strength is not None:
        study.train([Run()])
        study.latents()
        place = study.setting.up_to_site if options.freeze_downstream else {}
        runs.append(Run(defence="block", strength=options.strength, latents="k", overrides={**long, **place}, name="blocked"))
    study.train(runs)
    return runs


def main(options: Options) -> None:
    """Train, patch, and show each model."""
    page, places = options.page(), {"sites": options.sites, "components": options.components, "reverse": options.reverse}
    with options.study() as study:
        runs = train(study, options)
        arms = study.table(study.points([Run(defence="base"), *runs]), against=runs[0])
        page.add("arms", arms)
        swept = [
            study.step(
                f"patched-{options.split}-{when}",
                patching.patched_replies,
                study.points(runs),
                split=options.split,
                when=when,
                **places,
            )
            for when in options.when
        ]
    found = pd.concat(swept, ignore_index=True)
    for run in runs:
        rates = patching.patched_rates(pd.DataFrame(found[found["run"] == run.label]))
        page.add(f"patched-{run.label}", rates, plots.rates(rates, by="site", direction=found["direction"].iloc[0]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
