"""The sweep over lambda, of which `blockem sweep` and experiments/lambda_sweep.py are made."""

from collections.abc import Sequence

import pandas as pd

from blockem_tl.study import jobs
from blockem_tl.study.page import Page
from blockem_tl.study.run import Run
from blockem_tl.study.study import Study
from blockem_tl.study.summary import rates
from blockem_tl.views import studies

_BY = ("run", "strength", "overrides")


def lambda_sweep(
    study: Study, page: Page, *, lambdas: Sequence[float] = (), freeze_downstream: bool = False, smallest_wave: int = 1
) -> None:
    """Train plainly and with each lambda, and show them on the reporting prompts, and beside those on the core prompts.

    Args:
        page: gets the tables and figures arms, core and training.
        lambdas: the preset's by default.
        freeze_downstream: train each a second time, with LoRA up to the site's block.
        smallest_wave: of the discovery.
    """
    study.train([Run()])
    study.latents(smallest_wave=smallest_wave)
    places = [{}, study.setting.up_to_site] if freeze_downstream else [{}]
    weights = [weight for weight in lambdas or study.setting.preset.lambdas if weight]
    blocked = [Run(defence="block", strength=weight, latents="k", overrides=place) for place in places for weight in weights]
    chosen = [*(Run(overrides=place) for place in places), *blocked]
    study.train(chosen)
    points = study.points([Run(defence="base"), *chosen])
    arms = study.table(points, against=Run(), by=_BY)
    page.add("arms", arms, studies.along(arms.query("run != 'base'"), "strength", panels="overrides"))
    core, final = (rates(study.replies(split, points), by=_BY, against="plain") for split in ("core", "final"))
    page.add("core", _beside(core, final))
    curves = study.step("training", jobs.training_curve, study.points(chosen))
    page.add("training", curves.groupby("run", sort=False)[["sft", "smoothed"]].last().reset_index(), studies.training(curves))


def _beside(core: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """Rates on the core prompts, as core_misaligned and so on, beside those on the final ones."""
    names = ["n", *(name + end for name in ("misaligned", "incoherent") for end in ("", "_low", "_high"))]
    first = core[[*_BY, *names]].set_axis([*_BY, *(f"core_{name}" for name in names)], axis=1)
    return first.merge(final[[*_BY, *names]], on=list(_BY))
