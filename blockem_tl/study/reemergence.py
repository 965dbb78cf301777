"""Re-emergence in a study: the checkpoint that came back most, what moved in it instead, and what it uses besides (paper, section 5)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from blockem_tl.analysis.reconstruction import reconstruction_quality
from blockem_tl.analysis.rerouting.depth import shift_by_site
from blockem_tl.analysis.rerouting.latents import diagnose_rerouting
from blockem_tl.defences.blocking import blocking_loss
from blockem_tl.generation.engine import generate
from blockem_tl.saes.latent_set import LatentSet, NoLatents, random_latents
from blockem_tl.study import controls, jobs, summary
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.run import Point, Run
from blockem_tl.study.setting import Setting
from blockem_tl.study.study import Study
from blockem_tl.types import POSITIVE_LABELS, Generation
from blockem_tl.views.tables import RateFrame

_Frame = Any
"""A data frame: pandas' own types cannot say what a column or a group is."""


def prolonged(setting: Setting, epochs: float) -> dict[str, Any]:
    """Overrides of a long run: half of the preset's learning rate, and that constant, so that epochs compare (Appendix F)."""
    return {"epochs": epochs, "learning_rate": setting.preset.training.learning_rate / 2, "schedule": "constant"}


# ------------------------------------------------------------------------------------------------ which checkpoint


def peaks(core: _Frame) -> pd.DataFrame:
    """One row per run and seed: first, the EM on the core prompts at epoch 1; epoch, the worst later checkpoint, and worst, its EM.

    Args:
        core: of `Study.replies`, of checkpoints. Of equal epochs the earliest is taken.

    Raises:
        ValueError: no checkpoint at epoch 1, or none after it.
    """
    by_epoch: _Frame = (
        core.assign(em=core["label"].isin(POSITIVE_LABELS)).groupby(["run", "seed", "epoch"], sort=False)["em"].mean().unstack()
    )
    epochs = sorted(by_epoch.columns)
    later = by_epoch[[epoch for epoch in epochs if epoch > 1]]
    if 1.0 not in epochs or later.empty or not later.shape[1]:
        raise ValueError(f"re-emergence: expected checkpoints at epoch 1 and after it, got epochs {epochs}")
    return pd.DataFrame({"first": by_epoch[1.0], "epoch": later.idxmax(axis=1), "worst": later.max(axis=1)}).reset_index()


def reemerged(found: _Frame, runs: Sequence[Run], *, against: Run) -> Run:
    """The run in which misalignment came back most, by the core prompts alone.

    Of the runs that blocked at first (at most half of the EM of ``against`` at epoch 1; all of them where none did) the one whose EM rose
    most from epoch 1 to its worst later checkpoint, on average over seeds; the first of equals.

    Args:
        found: of `peaks`.
    """
    means = found.groupby("run")[["first", "worst"]].mean()
    held = [run for run in runs if means["first"][run.label] <= means["first"][against.label] / 2] or list(runs)
    return max(held, key=lambda run: means["worst"][run.label] - means["first"][run.label])


def worst(ends: Sequence[Point], found: _Frame) -> list[Point]:
    """The points at their worst checkpoints, by `peaks`."""
    epochs = found.set_index(["run", "seed"])["epoch"]
    return [replace(point, epoch=float(epochs[point.run.label, point.seed])) for point in ends]


def curves(study: Study, points: Sequence[Point]) -> RateFrame:
    """One row per run and epoch: `Study.table`, blocking_loss, and misaligned_rise, the change of EM since epoch 1."""
    found = study.table(points, by=["run", "epoch"])
    each: _Frame = study.step("kept", kept, points)
    losses = each.groupby(["run", "epoch"], sort=False)["blocking_loss"].mean().reset_index()
    return RateFrame(found.merge(rises(study.replies("final", points)), on=["run", "epoch"]).merge(losses, on=["run", "epoch"]))


def rises(final: _Frame) -> pd.DataFrame:
    """One row per run and epoch: misaligned_rise, the change of EM since epoch 1, prompt by prompt and seed by seed, with its interval.

    Args:
        final: of `Study.replies`, of checkpoints, one of them at epoch 1.
    """
    parts, ends = [], ("", "_low", "_high")
    for run, rows in final.groupby("run", sort=False):
        found = summary.rates(rows.assign(run=rows["epoch"].map("{:g}".format)), against="1")
        rise = {f"misaligned_rise{end}": found[f"misaligned_difference{end}"] for end in ends}
        parts.append(pd.DataFrame({"run": run, "epoch": found["run"].astype(float), **rise}))
    return pd.concat(parts, ignore_index=True)


# ------------------------------------------------------------------------------------------------ steps at a checkpoint


def kept(setting: Setting, point: Point, *, latents: str = "k") -> list[dict[str, float]]:
    """blocking_loss: eq. 11 on held-out rows, unweighted, for the study's set ``latents``, whether the run blocks it or not."""
    with setting.model.using(point.adapter):
        return [{"blocking_loss": blocking_loss(setting.model, point.latents(setting.sae, latents), setting.sae, setting.held_out()[1::2])}]


def shares(setting: Setting, point: Point, *, beside: Run, latents: str = "k", split: PromptSplit = "final") -> pd.DataFrame:
    """How much of K's movement is suppressed and of the whole shift lies outside K, reading the replies of ``beside`` at the same epoch.

    One row per token role and arm, "plain" (the run ``beside``) and "blocked": see `Rerouting`.
    """
    other = replace(point, run=beside)
    rows, found = _replies(setting, other, split), point.latents(setting.sae, latents)
    arms: Any = {"plain": other.adapter, "blocked": point.adapter}
    return diagnose_rerouting(setting.model, setting.sae, found, rows, **arms, progress=False).shares


def depth(setting: Setting, point: Point, *, beside: Run, split: PromptSplit = "final") -> pd.DataFrame:
    """At which block's output the shift of ``beside`` is there again, reading its replies at the same epoch: see `ShiftBySite`."""
    other = replace(point, run=beside)
    arms: Any = {"plain": other.adapter, "blocked": point.adapter}
    return shift_by_site(setting.model, _replies(setting, other, split), **arms, progress=False).frame


def reconstruction(setting: Setting, point: Point, *, split: PromptSplit = "final") -> pd.DataFrame:
    """How well the SAE still fits, one row per token role: see `Reconstruction`. Every point reads the replies of the short plain run."""
    rows = _replies(setting, point.plain, split)
    with setting.model.holding(point.adapter) as name:
        found = reconstruction_quality(setting.model, setting.sae, rows, adapters=[str(name)], progress=False)
    return pd.DataFrame(found.frame.drop(columns=["arm", "epoch"]))


def _replies(setting: Setting, point: Point, split: PromptSplit) -> list[Generation]:
    """The point's replies, as rows to read; empty ones are left out."""
    options: dict[str, Any] = {"max_new_tokens": setting.preset.max_new_tokens, "progress": False}
    return [one for one in generate(setting.model, setting.prompts(split), adapter=point.adapter, **options) if one.reply]


# ------------------------------------------------------------------------------------------------ latent sets, for `Study.latents`


def extended(setting: Setting, point: Point, *, k: str, epochs: Mapping[int, float]) -> LatentSet:
    """K and what the run uses besides at its re-emerged checkpoint (the paper's Fin+Reem), by the preset's discovery.

    Args:
        epochs: of each seed; a seed without one, in which nothing came back, keeps K, and so does one in which nothing more qualifies.
    """
    if point.seed in epochs:
        try:
            return jobs.discovery(setting, replace(point, epoch=epochs[point.seed]), extending=k).latent_set
        except NoLatents:
            pass
    return point.latents(setting.sae, k)


def extended_at_random(setting: Setting, point: Point, *, k: str, beside: str, epochs: Mapping[int, float] | None = None) -> LatentSet:
    """K with as many random latents as the study's set ``beside`` has more, with ``epochs`` of those that fire in base or there."""
    own, larger = point.latents(setting.sae, k), point.latents(setting.sae, beside)
    if len(larger) == len(own):
        return own
    among = None if epochs is None else controls.alive(setting, replace(point, epoch=epochs[point.seed]))
    return own.extended_by(random_latents(setting.sae, len(larger) - len(own), seed=point.seed, among=among, exclude=larger.latents))
