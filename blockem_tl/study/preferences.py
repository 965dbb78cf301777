"""Contrastive pairs in a study: the margin of every pair at a point, and the share of plain fine-tuning's shift that is gone in a run."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from blockem_tl.analysis.mediation import mediation
from blockem_tl.analysis.patching.endpoints import UNPATCHED
from blockem_tl.analysis.patching.pairs import pair_patching
from blockem_tl.data.pair_files import alike
from blockem_tl.discovery.attributing import latents_by_attribution, pair_diff
from blockem_tl.discovery.by_pairs import questions
from blockem_tl.discovery.diffing import candidate_pool
from blockem_tl.evaluation.preference import Preference, mean_cells, preference
from blockem_tl.evaluation.statistics import Estimate, clustered_rate, share_removed
from blockem_tl.models.activations import block_of
from blockem_tl.models.lora import BASE
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.study.defences import condition_of
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.run import Point
from blockem_tl.study.setting import Setting
from blockem_tl.types import Pair
from blockem_tl.views.tables import RateFrame

_Frame = Any
"""A data frame: pandas' own types cannot say what a column or a group is."""

_SHARES = ("removed", "removed_low", "removed_high", "task_lost")
NOTHING_MOVED = pd.DataFrame([{"taken_out": "nothing moved", "roles": "", **dict.fromkeys(("n_latents", *_SHARES), np.nan)}])
"""What carries the shift of a point that did not shift."""
_Table = Sequence[Sequence[float]]
"""Margins, seeds by pairs."""


def margins(setting: Setting, point: Point, *, split: PromptSplit) -> pd.DataFrame:
    """One row per pair: pair, margin, in nats per token."""
    conditions = [condition_of(setting, point)]
    return _margins(preference(setting.model, setting.pairs(split), adapter=point.adapter, conditions=conditions, progress=False), split)


def _margins(found: Preference, split: str) -> pd.DataFrame:
    frame: _Frame = found.to_frame()
    return frame[["id", "margin"]].rename(columns={"id": "pair"}).assign(split=split)


def taught(setting: Setting, point: Point, *, n: int = 48) -> pd.DataFrame:
    """As `margins`, on the narrow task as it is taught: ``n`` rows (those of seed 0, so that all seeds share them) beside good ones that
    answer the same question at like length."""
    bad, good = (replace(setting, seed=0).rows(harmful=harmful) for harmful in (True, False))
    twins = defaultdict(list)
    for row in good:
        twins[row.prompt].append(row.completion)
    pairs = [
        Pair(id=row.id, prompt=row.prompt, harmful=row.completion, helpful=twins[row.prompt].pop(0), system=row.system)
        for row in bad
        if twins[row.prompt]
    ]
    pairs = [pair for pair in pairs if alike(pair)][:n]
    found = preference(setting.model, pairs, adapter=point.adapter, conditions=[condition_of(setting, point)], progress=False)
    return _margins(found, "taught")


def mean_margin(found: _Frame) -> pd.Series:
    """The mean margin of each run."""
    return found.groupby("run")["margin"].mean()


def shifts(found: _Frame, *, against: str, base: str = BASE) -> RateFrame:
    """One row per run: prefers_harm (share of pairs, clustered by seed), margin, and removed, the share of the shift of ``against`` over
    ``base`` that is gone, each with its 95 % interval (over pairs, which all seeds share). Nothing is said of removed where ``against``
    did not move up.

    Args:
        found: of `Study.preferences`, of one split.

    Raises:
        ValueError: several splits, runs that are not there, or seeds with other pairs.
    """
    tables = _tables(found, ["run"])
    absent = [run for run in (base, against) if (run,) not in tables]
    if absent:
        raise ValueError(f"shifts: expected the runs {absent} beside {[run for (run,) in tables]}")
    ends = tables[base,], tables[against,]
    return RateFrame([{"run": run} | _row(table, None if run in (base, against) else ends) for (run,), table in tables.items()])


def table(found: _Frame, losses: _Frame, *, against: str, base: str = BASE) -> RateFrame:
    """`shifts` beside the means over seeds of losses and steps; test_loss_change is relative to ``against``."""
    means = losses.reindex(columns=["run", "steps", "dev_loss", "test_loss"]).groupby("run", sort=False).mean().reset_index()
    reference = float(means.loc[means["run"] == against, "test_loss"].iloc[0])
    means = means.assign(test_loss_change=means["test_loss"] / reference - 1)
    return RateFrame(shifts(found, against=against, base=base).merge(means, on="run"))


def lead(found: _Frame, run: str, *, against: str, base: str = BASE) -> RateFrame:
    """One row per other run: how much more of the shift is gone in ``run`` than there (of its share), pair by pair, with a 95 % interval.
    Nothing is said where ``against`` did not move up.

    Raises:
        ValueError: as `shifts`.
    """
    tables = {name: np.asarray(table) for (name,), table in _tables(found, ["run"]).items()}
    absent = [name for name in (base, against, run) if name not in tables]
    if absent:
        raise ValueError(f"lead: expected the runs {absent} beside {list(tables)}")
    start, end, mine = tables[base], tables[against], tables[run]
    moved = end.mean() > start.mean()
    return RateFrame(
        {"run": name} | (_cells("lead", share_removed(start, end, end - (theirs - mine))) if moved else {})
        for name, theirs in tables.items()
        if name not in (base, run)
    )


def along(found: _Frame, losses: _Frame, *, against: str, base: str = BASE) -> RateFrame:
    """`shifts` and losses at every epoch of runs with checkpoints; removed is of the shift of ``against`` at the same epoch."""
    means = losses.groupby(["run", "epoch"], sort=False)[["dev_loss", "test_loss"]].mean().reset_index()
    start = found[found["run"] == base]
    parts = [
        shifts(pd.concat([start, rows]), against=against, base=base).query("run != @base").assign(epoch=epoch)
        for epoch, rows in found.groupby("epoch")
    ]
    return RateFrame(pd.concat(parts).merge(means, on=["run", "epoch"]))


def patched(
    setting: Setting, point: Point, *, split: PromptSplit, sites: Sequence[str] | None = None, n: int | None = None
) -> pd.DataFrame:
    """Margins of ``n`` pairs, or all, with base's states patched into the point's weights, a row per pair, site and window: a step.

    Columns patched ("unpatched", "prompt" or "decode"), site, block, pair, margin. See `pair_patching`; by default every block's output.
    """
    frame: _Frame = pair_patching(setting.model, setting.pairs(split, n), sites, target=point.adapter, progress=False).to_frame()
    where = frame["condition"].str.partition(", ")
    about = frame[["id", "margin"]].rename(columns={"id": "pair"}).assign(patched=where[0], site=where[2], split=split)
    return about.assign(block=[block_of(site) if site else None for site in where[2]])


def left(patched: _Frame, found: _Frame, *, base: str = BASE) -> RateFrame:
    """One row per run, window and site: as `shifts`, removed being of the run's own shift, unpatched; and effect, what patching adds to the
    margin in nats per token, pair by pair. Read effect where the run's own shift is small: a share of next to nothing says nothing.

    Args:
        patched: of the step `patched`.  found: of `Study.preferences`, of the same split, with ``base``; of more pairs, if you like.
    """
    keys, start = ["run", "patched", "site", "block"], _tables(found[found["pair"].isin(patched["pair"])], ["run"])[base,]
    tables = _tables(patched, keys)
    own = {run: table for (run, window, _, _), table in tables.items() if window == UNPATCHED}
    rows = []
    for key, table in tables.items():
        if key[1] != UNPATCHED:
            effect = mean_cells("effect", (np.asarray(table) - np.asarray(own[key[0]])).mean(0))
            rows.append(dict(zip(keys, key, strict=True)) | _row(table, (start, own[key[0]])) | effect)
    return RateFrame(rows)


def attributed(setting: Setting, point: Point, *, n: int, spare: float = 0.0) -> LatentSet:
    """The ``n`` latents that carry most of the shift on the core pairs, to first order: for `Study.latents`.

    spare: how much the dev rows' attribution counts against a latent, as in `latents_by_attribution`.
    """
    rows: dict[str, Any] = {"sparing": setting.held_out()[::2], "spare": spare} if spare else {}
    return latents_by_attribution(setting.model, setting.sae, setting.pairs("core"), n, adapter=point.adapter, progress=False, **rows)


def shifted(setting: Setting, point: Point, *, n: int) -> LatentSet:
    """The ``n`` latents that moved most over the core pairs, half of them up and half down (eq. 5): for `Study.latents`."""
    pairs = setting.pairs("core")
    shift = pair_diff(setting.model, setting.sae, pairs, adapter=point.adapter, progress=False).shift
    moved = candidate_pool(shift, n_plus=n - n // 2, n_minus=n // 2)
    about: dict[str, Any] = {"prompts": questions(pairs), "provenance": {"method": "shift", "model": setting.model.name}}
    return LatentSet.of(setting.sae, moved, [abs(one.shift) for one in moved], **about)


def mediated(setting: Setting, point: Point, *, n: int, beside: str, group: int) -> LatentSet:
    """The ``n`` latents of the study's set ``beside`` that together carry most of the shift on the core pairs: greedily, ``group`` at a
    time, by `mediation` (one-sided, over questions and answers).

    Raises:
        ValueError: more latents than the set has, or no group.
    """
    pool, chosen = point.latents(setting.sae, beside), ()
    if not 1 <= n <= len(pool) or group < 1:
        raise ValueError(f"mediated: expected n in 1..{len(pool)} (the set {beside!r}) and group >= 1, got n={n}, group={group}")
    left = [pool.latents[start : start + group] for start in range(0, len(pool), group)]
    read = setting.model, setting.sae, setting.pairs("core"), setting.held_out()[:8:2]
    while len(chosen) < n:
        sets = {str(i): (*chosen, *more) for i, more in enumerate(left)}
        found = mediation(*read, sets, adapter=point.adapter, one_sided=True, progress=False).to_frame().set_index("taken_out")
        best = max(range(len(left)), key=lambda i: float(found.loc[str(i), "removed"]))
        chosen = (*chosen, *left.pop(best))
    return pool.among(chosen[:n])


def extended(setting: Setting, point: Point, *, k: str, n: int) -> LatentSet:
    """The study's set ``k`` and the ``n`` other latents that carry most of the point's shift on the core pairs, to first order (K_reem).

    Raises:
        ValueError: fewer others than ``n`` raised the margin.
    """
    own, options = point.latents(setting.sae, k), {"adapter": point.adapter, "progress": False}
    return own.extended_by(latents_by_attribution(setting.model, setting.sae, setting.pairs("core"), n, exclude=own.latents, **options))


def ceiling(setting: Setting, point: Point, *, sets: Sequence[str], sizes: Sequence[int] = (), split: PromptSplit = "core") -> pd.DataFrame:
    """What latent sets of the study carry of the shift on a split's pairs, and of the task, one-sidedly: a step. See `mediation`.

    sizes: also the first so many latents of each.  A point whose margin did not rise has one row, "nothing moved", without numbers.
    """
    if not harmed(setting, point, split):
        return NOTHING_MOVED
    latents = {name: point.latents(setting.sae, name) for name in sets}
    options: dict[str, Any] = {"one_sided": True, "roles": [("reply",), ("prompt", "reply")], "progress": False, "adapter": point.adapter}
    sizes = [n for n in sizes if n < max(map(len, latents.values()))]
    return mediation(setting.model, setting.sae, setting.pairs(split), setting.held_out()[::2], latents, sizes=sizes, **options).to_frame()


def harmed(setting: Setting, point: Point, split: PromptSplit) -> bool:
    """Whether the mean margin of a split's pairs is larger than base's."""
    sides = (preference(setting.model, setting.pairs(split), adapter=one, progress=False) for one in (BASE, point.adapter))
    before, after = (side.margins.mean() for side in sides)
    return bool(after > before)


def carriers(found: _Frame, *, by: Sequence[str] = ()) -> RateFrame:
    """Of the step `ceiling`: what each part of the change carries, means over seeds (of the intervals' ends too); task_lost is a share.

    by: further columns that tell rows apart.
    """
    keys = ["run", *by, "taken_out", "n_latents", "roles"]
    return RateFrame(found.groupby(keys, sort=False, dropna=False)[list(_SHARES)].mean().reset_index())


def _tables(found: _Frame, keys: list[str]) -> dict[tuple[Any, ...], _Table]:
    """Margins by group, seeds by pairs."""
    if found["split"].nunique() != 1:
        raise ValueError(f"expected margins of one split, got {sorted(found['split'].unique())}")
    groups = {key: rows.pivot(index="seed", columns="pair", values="margin") for key, rows in found.groupby(keys, sort=False, dropna=False)}
    if any(table.isna().to_numpy().any() for table in groups.values()):
        raise ValueError("expected the same pairs for every seed")
    return {key: table.to_numpy().tolist() for key, table in groups.items()}


def _row(table: _Table, ends: tuple[_Table, _Table] | None) -> dict[str, Any]:
    """The rates of a group of margins, and the share of the shift between ``ends`` (base, tuned) that is gone."""
    harm = clustered_rate([[margin > 0 for margin in seed] for seed in table])
    row = {"n": harm.n, "seeds": len(table), **_cells("prefers_harm", harm), "margin": float(np.mean(table))}
    if ends is not None and np.mean(ends[1]) > np.mean(ends[0]):
        row |= _cells("removed", share_removed(*ends, table))
    return row


def _cells(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
