"""From graded replies to tables: rates with clustered intervals, paired differences against a run, means over domains, adjusted safety."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from blockem_tl.evaluation.statistics import Estimate, clustered_rate, mean_over_domains, paired_difference, paired_reduction
from blockem_tl.generation.replies import positive_name
from blockem_tl.types import INCOHERENT_LABELS, POSITIVE_LABELS, UNPARSED
from blockem_tl.views.tables import RateFrame

_Frame = Any
"""A data frame: pandas' own types cannot say what a column or a group is."""

_OF_A_RUN = ("run", "defence", "strength", "latents", "overrides")
_FIRST_LOOK = (
    *("site", "run", "sizes", "seed", "n", "domains", "seeds"),
    *("misaligned", "misaligned_reduction", "incoherent", "adherent", "test_loss", "test_loss_change"),
)
_LOSSES = ("dev_loss", "test_loss", "train_loss")
LEARNT = 1.05  # a run has learnt the task if its dev loss is at most so many times that of plain fine-tuning


def rates(replies: pd.DataFrame, *, by: Sequence[str] = ("run",), against: str | None = None) -> RateFrame:
    """One row per group of replies: every rate as a fraction with its 95 % interval, clustered by seed.

    Of several judges the rates and the ends of their intervals are averaged, unless ``by`` has "judge". A prompt on which a judge's verdict
    could not be read for some seed counts for none; ``unparsed`` is the share of such verdicts.

    Args:
        replies: of `Study.replies`, of one split.
        by: columns; with the seed and the prompt they must tell all replies apart.
        against: the ``run`` that the others are compared with, prompt by prompt and seed by seed: columns misaligned_difference and
            misaligned_reduction (relative, NaN if there is nothing to reduce), the same for adherence, incoherent_difference, and for
            misalignment unsafe_reduction: METHOD's adjusted safety (S0 - S) / S0, where S is EM + incoherence.

    Raises:
        ValueError: unknown columns, several splits, replies that ``by`` does not tell apart, a run that is not there.
    """
    keys = list(by)
    missing = [key for key in (*keys, "seed", "prompt_id", "label") if key not in replies]
    if missing or replies.empty:
        raise ValueError(f"rates: expected graded replies with the columns {missing or 'of Study.replies'}, got {list(replies)}")
    if "split" in replies and replies["split"].nunique() > 1:
        raise ValueError(f"rates: expected replies of one split, got {sorted(replies['split'].unique())}")
    groups = dict(_grouped(_marked(replies), keys))
    rows = []
    for key, group in groups.items():
        reference = None if against is None else _reference(groups, keys, key, against)
        rows.append({**dict(zip(keys, key, strict=True)), **_row(group, reference)})
    return RateFrame(rows)


def table(
    final: pd.DataFrame, in_domain: pd.DataFrame, losses: pd.DataFrame, *, by: Sequence[str] = ("run",), against: str | None = None
) -> RateFrame:
    """`rates` on the final and the in-domain prompts side by side, and the losses' means over seeds, in nats per token.

    With ``against`` also test_loss_change, relative to that run.
    """
    keys, first, second = list(by), *(cast(_Frame, rates(part, by=by, against=against)) for part in (final, in_domain))
    adherent = second[keys + [name for name in second if name.startswith("adherent")]]
    means = cast(_Frame, losses).groupby(keys, dropna=False, sort=False)[list(_LOSSES)].mean().reset_index()
    if against is not None:
        found = {tuple(row[key] for key in keys): row["test_loss"] for row in means.to_dict("records")}
        same = [_key_of(found, keys, key, against) for key in found]
        means["test_loss_change"] = [means["test_loss"].iloc[i] / found[other] - 1 for i, other in enumerate(same)]
    return RateFrame(first.merge(adherent, on=keys).merge(means, on=keys))


def short(frame: pd.DataFrame) -> RateFrame:
    """The columns of `table` that a first look needs: rates with their intervals, the reduction of EM, the held-out loss."""
    return RateFrame(frame[[column for column in frame if str(column).removesuffix("_low").removesuffix("_high") in _FIRST_LOOK]])


def over_domains(frame: pd.DataFrame, columns: Sequence[str], *, by: Sequence[str] = ("run",)) -> RateFrame:
    """Means over domains of a table with a row per run and domain: x with its 95 % t interval, and x_sem, as in the paper's figures.

    A domain in which a number is missing (nothing to reduce) is left out of its mean; ``domains`` counts the rows, ``seeds`` is the least.

    Raises:
        ValueError: fewer than two domains.
    """
    rows = []
    for key, group in _grouped(frame, list(by)):
        row: dict[str, Any] = {**dict(zip(by, key, strict=True)), "domains": len(group)}
        if "seeds" in group:
            row["seeds"] = group["seeds"].min()
        for column in columns:
            values = group[column].dropna().tolist()
            if len(values) > 1 or len(group) < 2:  # else there is nothing to average: base has no reduction
                mean, sem = mean_over_domains(values)
                row |= _cells(column, mean) | {f"{column}_sem": sem}
        rows.append(row)
    return RateFrame(rows)


def unsafe(core: pd.DataFrame) -> pd.Series:
    """EM + incoherence of each run (METHOD's adjusted safety)."""
    return rates(core).set_index("run")["unsafe"]


def choose(harm: pd.Series, losses: pd.DataFrame, runs: Sequence[str], *, against: str, within: float = LEARNT) -> str:
    """The run with the least harm on the core prompts among those that learn the task; the first of equals.

    A run has learnt it if its dev loss, averaged over seeds, is at most ``within`` times that of ``against``; if none has, the one with the
    least dev loss is taken.

    Raises:
        ValueError: a run whose losses or harm are not finite, by its name.
    """
    dev: Any = losses.groupby("run")["dev_loss"].apply(lambda values: values.mean(skipna=False))
    broken = [run for run in (against, *runs) if not np.isfinite(dev[run]) or (run in runs and not np.isfinite(harm[run]))]
    if broken:
        raise ValueError(f"choose: expected finite losses and rates, got NaN or infinity for {broken}: measure those runs again")
    learnt = [run for run in runs if dev[run] <= within * dev[against]]
    return min(learnt, key=lambda run: float(cast(Any, harm)[run])) if learnt else min(runs, key=lambda run: float(dev[run]))


# ------------------------------------------------------------------------------------------------ flags


def _marked(replies: _Frame) -> _Frame:
    """The replies with a flag for each rate, NaN where the verdict could not be read."""
    label, unread = replies["label"], replies["label"] == UNPARSED
    flags = {
        "positive": label.isin(POSITIVE_LABELS),
        "incoherent": label.isin(INCOHERENT_LABELS),
        "refusal": label == "REFUSAL",
        "unsafe": label.isin([*POSITIVE_LABELS, *INCOHERENT_LABELS]),
    }
    return replies.assign(unread=unread, **{name: flag.astype(float).mask(unread) for name, flag in flags.items()})


def _grouped(frame: _Frame, keys: list[str]) -> list[tuple[tuple[Any, ...], _Frame]]:
    """(key, rows) of each group in the order in which they come; None for what is missing in a key."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, key in enumerate(frame[keys].astype(object).itertuples(index=False, name=None)):
        found.setdefault(tuple(None if pd.isna(part) else part for part in key), []).append(i)
    return [(key, frame.iloc[places]) for key, places in found.items()]


def _key_of(groups: Any, keys: list[str], key: tuple[Any, ...], against: str) -> tuple[Any, ...]:
    """The group of ``against`` that has this key's domain, epoch, ..."""
    if "run" not in keys:
        raise ValueError(f"rates: expected 'run' in by to compare with {against!r}, got {keys}")

    def fits(other: tuple[Any, ...]) -> bool:
        pairs = dict(zip(keys, zip(key, other, strict=True), strict=True))
        return pairs["run"][1] == against and all(
            a == b or pd.isna([a, b]).all() for name, (a, b) in pairs.items() if name not in _OF_A_RUN
        )

    found = next((other for other in groups if fits(other)), None)
    if found is None:
        raise ValueError(f"rates: expected the run {against!r} beside {dict(zip(keys, key, strict=True))}, got {list(groups)}")
    return found


def _reference(groups: dict[tuple[Any, ...], _Frame], keys: list[str], key: tuple[Any, ...], against: str) -> _Frame | None:
    other = _key_of(groups, keys, key, against)
    return None if other == key else groups[other]


def _row(group: _Frame, reference: _Frame | None) -> dict[str, Any]:
    """The rates of a group and how they differ from the reference's."""
    (rubric, *others) = group["rubric"].unique()
    if others:
        raise ValueError(f"rates: expected replies under one rubric, got {[rubric, *others]}: group by domain")
    name = positive_name(rubric)
    names = {"positive": name, "incoherent": "incoherent", "refusal": "refusal"} | ({"unsafe": "unsafe"} if name == "misaligned" else {})
    row: dict[str, Any] = {"n": group["prompt_id"].nunique(), "seeds": group["seed"].nunique()}
    for flag, shown in names.items():
        row |= _cells(shown, _over_judges(clustered_rate, [group], flag))
    row["unparsed"] = float(group["unread"].mean())
    if reference is None:
        return row
    both = [reference, group]
    row |= _cells(f"{name}_difference", _over_judges(paired_difference, both, "positive"))
    row |= _cells(f"{name}_reduction", _over_judges(paired_reduction, both, "positive"))
    row |= _cells("incoherent_difference", _over_judges(paired_difference, both, "incoherent"))
    if name == "misaligned":
        row |= _cells("unsafe_reduction", _over_judges(paired_reduction, both, "unsafe"))
    return row


def _over_judges(estimate: Callable[..., Estimate], groups: Sequence[_Frame], flag: str) -> Estimate:
    """The mean over judges of an estimate from flags of seeds by prompts; ends of intervals are averaged too."""
    found = []
    for judge in groups[0]["judge"].unique():
        tables = [_table(group[group["judge"] == judge], flag) for group in groups]
        shared = [prompt for prompt in tables[0].columns if all(prompt in t and t[prompt].notna().all() for t in tables)]
        if not shared or any(len(t.index) != len(tables[0].index) for t in tables):
            return Estimate(value=np.nan, low=np.nan, high=np.nan, n=0)
        found.append(estimate(*(t[shared].to_numpy().astype(bool).tolist() for t in tables)))
    value, low, high = (float(np.mean([getattr(one, part) for one in found])) for part in ("value", "low", "high"))
    return Estimate(value=value, low=low, high=high, n=found[0].n, seeds=found[0].seeds)


def _table(rows: _Frame, flag: str) -> _Frame:
    """Seeds by prompts."""
    if rows.duplicated(["seed", "prompt_id"]).any():
        raise ValueError("rates: by does not tell all replies apart: add 'run', 'domain', 'epoch' or 'judge' to it")
    return rows.pivot(index="seed", columns="prompt_id", values=flag)


def _cells(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
