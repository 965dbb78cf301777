"""Contrastive pairs in a study: the margin of every pair at a point, and the share of plain fine-tuning's shift that is gone in a run."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from blockem_tl.analysis.mediation import mediation
from blockem_tl.discovery.attributing import latents_by_attribution
from blockem_tl.evaluation.preference import preference
from blockem_tl.evaluation.statistics import Estimate, clustered_rate, share_removed
from blockem_tl.models.lora import BASE
from blockem_tl.saes.latent_set import LatentSet, random_latents
from blockem_tl.study.defences import condition_of
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.run import Point
from blockem_tl.study.setting import Setting
from blockem_tl.views.tables import RateFrame


def margins(setting: Setting, point: Point, *, split: PromptSplit) -> pd.DataFrame:
    """One row per pair: pair, margin, in nats per token."""
    conditions = [condition_of(setting, point)]
    frame = preference(setting.model, setting.pairs(split), adapter=point.adapter, conditions=conditions, progress=False).to_frame()
    return frame[["id", "margin"]].rename(columns={"id": "pair"}).assign(split=split)


def mean_margin(core: pd.DataFrame) -> "pd.Series[Any]":
    """The mean margin of each run."""
    return core.groupby("run")["margin"].mean()


def shifts(found: pd.DataFrame, *, against: str, base: str = BASE) -> RateFrame:
    """One row per run: prefers_harm (share of pairs, clustered by seed), margin, and removed, the share of the shift of ``against`` over
    ``base`` that is gone, each with its 95 % interval (over pairs, which all seeds share). Nothing is said of removed where ``against``
    did not move up.

    Args:
        found: of `Study.preferences`, of one split.

    Raises:
        ValueError: several splits, runs that are not there, or seeds with other pairs.
    """
    if found["split"].nunique() != 1:
        raise ValueError(f"shifts: expected margins of one split, got {sorted(found['split'].unique())}")
    tables = {run: _table(rows) for run, rows in found.groupby("run", sort=False)}
    absent = [run for run in (base, against) if run not in tables]
    if absent:
        raise ValueError(f"shifts: expected the runs {absent} beside {list(tables)}")
    rows, moved = [], found[found["run"] == against]["margin"].mean() - found[found["run"] == base]["margin"].mean()
    for run, table in tables.items():
        harm = clustered_rate([[margin > 0 for margin in seed] for seed in table])
        row = {"run": run, "n": harm.n, "seeds": len(table), **_cells("prefers_harm", harm)}
        row["margin"] = float(sum(map(sum, table)) / harm.n / len(table))
        if run not in (base, against) and moved > 0:
            row |= _cells("removed", share_removed(tables[base], tables[against], table))
        rows.append(row)
    return RateFrame(rows)


def table(found: pd.DataFrame, losses: pd.DataFrame, *, against: str, base: str = BASE) -> RateFrame:
    """`shifts` beside the losses' means over seeds; test_loss_change is relative to ``against``."""
    means: Any = losses.groupby("run", sort=False)[["dev_loss", "test_loss"]].mean().reset_index()
    reference = float(means.loc[means["run"] == against, "test_loss"].iloc[0])
    return RateFrame(
        shifts(found, against=against, base=base).merge(means.assign(test_loss_change=means["test_loss"] / reference - 1), on="run")
    )


def attributed(setting: Setting, point: Point, *, n: int) -> LatentSet:
    """The ``n`` latents that carry most of the shift on the core pairs, to first order: for `Study.latents`."""
    return latents_by_attribution(setting.model, setting.sae, setting.pairs("core"), n, adapter=point.adapter, progress=False)


def random_beside(setting: Setting, point: Point, *, beside: str) -> LatentSet:
    """As many latents as the study's set ``beside`` has, drawn from the others by the seed: for `Study.latents`."""
    found = point.latents(setting.sae, beside)
    return random_latents(setting.sae, len(found), seed=point.seed, exclude=found.latents)


def ceiling(setting: Setting, point: Point, *, latents: str, sizes: Sequence[int]) -> pd.DataFrame:
    """What a set's latents carry of the shift on the core pairs, and of the task: a step. See `mediation`."""
    found = point.latents(setting.sae, latents)
    options: dict[str, Any] = {"one_sided": True, "roles": [("reply",), ("prompt", "reply")], "progress": False}
    sizes = [n for n in sizes if n < len(found)]
    pairs, rows = setting.pairs("core"), setting.held_out()[::2]
    return mediation(setting.model, setting.sae, pairs, rows, {"K": found}, adapter=point.adapter, sizes=sizes, **options).to_frame()


def _table(rows: pd.DataFrame) -> Sequence[Sequence[float]]:
    """Margins, seeds by pairs."""
    table = rows.pivot(index="seed", columns="pair", values="margin")
    if table.isna().to_numpy().any():
        raise ValueError("shifts: expected the same pairs for every seed")
    return table.to_numpy().tolist()


def _cells(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
