"""Does blocking lower emergent misalignment as lambda grows, and what does it cost? (paper: figures 4, 5, 9, 10)

    python experiments/lambda_sweep.py --preset organism --seeds 0 1 2
    python experiments/lambda_sweep.py --preset organism --domain health
    python experiments/lambda_sweep.py --preset organism --freeze-downstream

Nothing is chosen: every lambda of the preset is shown, on the reporting prompts, and beside them on the core prompts, which found the
latents. With --domain health: figures 15 and 16. With --freeze-downstream, which trains each run a second time with LoRA only up to the
blocked block: figures 12 and 13.
"""

from dataclasses import dataclass
from typing import ClassVar

import tyro

from blockem_tl import Run, Study, rates
from blockem_tl.models.activations import block_of
from blockem_tl.study import jobs
from blockem_tl.study.options import StudyOptions
from blockem_tl.views import studies


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """lambdas: the preset's by default.  freeze_downstream: also train with LoRA up to the blocked block alone."""

    lambdas: tuple[float, ...] = ()
    freeze_downstream: bool = False
    name: ClassVar[str] = "lambda_sweep"


def runs(study: Study, options: Options) -> list[Run]:
    """Plain fine-tuning and each lambda; both again with LoRA up to the site's block."""
    places = [{}, {"up_to_block": block_of(study.setting.site)}] if options.freeze_downstream else [{}]
    lambdas = [weight for weight in options.lambdas or study.setting.preset.lambdas if weight]
    blocked = [Run(defence="block", strength=weight, latents="k", overrides=place) for place in places for weight in lambdas]
    return [*(Run(overrides=place) for place in places), *blocked]


def main(options: Options) -> None:
    """The whole sweep."""
    page, by = options.page(), ["run", "strength", "overrides"]
    with options.study() as study:
        study.train([Run()])
        study.latents()
        chosen = runs(study, options)
        study.train(chosen)
        points = study.points([Run(defence="base"), *chosen])
        arms = study.table(points, against=Run(), by=by)
        trained = arms.query("run != 'base'")
        page.add("arms", arms, studies.along(trained, "strength", panels="overrides"))
        core, final = (rates(study.replies(split, points), by=by, against="plain") for split in ("core", "final"))
        columns = [*by, "n", "misaligned", "misaligned_low", "misaligned_high", "incoherent", "incoherent_low", "incoherent_high"]
        both = core[columns].merge(final[columns], on=by, suffixes=(" on core", ""))
        page.add("core", both.rename(columns=lambda name: name if " on core" not in name else f"core_{name.replace(' on core', '')}"))
        curves = study.step("training", jobs.training_curve, study.points(chosen))
        page.add("training", curves.groupby("run", sort=False)[["sft", "smoothed"]].last().reset_index(), studies.training(curves))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
