"""Intervals: no rate is printed without its n and its 95 % interval. docs/statistics.md says how well they cover.

Flags are what a judge's verdicts come down to: [n_prompts] of booleans, or [n_seeds, n_prompts] where several training seeds answered
the same prompts. Two arms are compared prompt by prompt and seed by seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import bootstrap, t
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.power import NormalIndPower

from blockem_tl.types import Rate

Flags = Sequence[bool] | Sequence[Sequence[bool]]
Numbers = Sequence[float] | Sequence[Sequence[float]] | Sequence[np.ndarray] | np.ndarray
_Weighted = tuple[Float[np.ndarray, " resamples"], Float[np.ndarray, " resamples"]]
_PSEUDO = 0.25  # weight of each of the four outcomes (both, before only, after only, neither): together one prompt that nobody asked


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate:
    """A number with its 95 % interval, from ``n`` prompts (or domains) and ``seeds`` training seeds; prints in per cent."""

    value: float
    low: float
    high: float
    n: int
    seeds: int = 1

    def __repr__(self) -> str:
        return f"Estimate({self})"

    def __str__(self) -> str:
        seeds = f", {self.seeds} seeds" if self.seeds > 1 else ""
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] (n = {self.n}{seeds})"


# ------------------------------------------------------------------------------------------------ one arm


def average_rate(rates: Sequence[Rate]) -> Estimate:
    """The mean of several judges' rates on the same prompts, with Wilson's interval for the smallest n.

    Judges that agree add no information and judges that differ only narrow the truth, so the interval is on the safe side.
    """
    if not rates:
        raise ValueError("average: expected at least one rate, got none")
    value, n, z = sum(rate.value for rate in rates) / len(rates), min(rate.n for rate in rates), 1.959963984540054
    centre, half = (value + z * z / (2 * n)), z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return Estimate(value=value, low=max(0.0, (centre - half) / (1 + z * z / n)), high=min(1.0, (centre + half) / (1 + z * z / n)), n=n)


def clustered_rate(flags: Flags, *, resamples: int = 4000, seed: int = 0) -> Estimate:
    """One arm's rate over all seeds and prompts; the bootstrap draws prompts and seeds, since answers of one seed go together."""
    table = _table(flags)
    after, _ = _bootstrap(table, table, resamples, seed)
    low, high = np.percentile(after, [2.5, 97.5])
    return Estimate(value=float(table.mean()), low=float(low), high=float(high), n=table.shape[1], seeds=table.shape[0])


# ------------------------------------------------------------------------------------------------ two arms on the same prompts


def paired_difference(before: Flags, after: Flags, *, resamples: int = 4000, seed: int = 0) -> Estimate:
    """rate after - rate before, with a bootstrap over prompts (both arms together), clustered by seed."""
    first, second = _pair(before, after)
    start, end = _bootstrap(first, second, resamples, seed)
    low, high = np.percentile(end - start, [2.5, 97.5])
    value = float(second.mean() - first.mean())
    return Estimate(value=value, low=float(low), high=float(high), n=first.shape[1], seeds=first.shape[0])


def paired_reduction(before: Flags, after: Flags, *, resamples: int = 4000, seed: int = 0) -> Estimate:
    """(rate before - rate after) / rate before, with the same bootstrap. NaN where nothing was there to reduce."""
    first, second = _pair(before, after)
    size = {"n": first.shape[1], "seeds": first.shape[0]}
    if not first.any():
        return Estimate(value=math.nan, low=math.nan, high=math.nan, **size)
    start, end = _bootstrap(first, second, resamples, seed)
    low, high = np.percentile((start - end) / start, [2.5, 97.5])
    return Estimate(value=float((first.mean() - second.mean()) / first.mean()), low=float(low), high=float(high), **size)


def share_removed(base: Numbers, tuned: Numbers, arm: Numbers, *, resamples: int = 2000) -> Estimate:
    """1 - (arm - base) / (tuned - base): the share of tuned's shift in a mean that is gone in an arm; percentile bootstrap over prompts.

    Args:
        base, tuned, arm: a number per prompt (a margin), [n_prompts], or [n_seeds, n_prompts] where several seeds answered the same ones.

    Raises:
        ValueError: unequal shapes, fewer than two prompts, numbers that are not finite, or a tuned model whose mean did not rise.
    """
    before, after, found = (np.atleast_2d(np.asarray(values, dtype=float)) for values in (base, tuned, arm))
    if not before.shape == after.shape == found.shape or before.ndim != 2 or before.shape[1] < 2:
        raise ValueError(f"share removed: expected equal shapes of two prompts at least, got {before.shape}, {after.shape}, {found.shape}")
    if not all(np.isfinite(values).all() for values in (before, after, found)):
        raise ValueError("share removed: expected finite numbers, got NaN or infinity: measure those prompts again")
    left, gap = (found - before).mean(0), (after - before).mean(0)  # seeds answer the same prompts: prompts are drawn
    if gap.mean() <= 0:
        raise ValueError(f"share removed: expected a tuned model that moved up, its mean moved by {gap.mean():+.4f}")
    drawn = bootstrap((left, gap), _removed, paired=True, n_resamples=resamples, method="percentile", rng=0)
    low, high = map(float, drawn.confidence_interval)
    return Estimate(value=float(_removed(left, gap)), low=low, high=high, n=before.shape[1], seeds=before.shape[0])


def _removed(left: Float[np.ndarray, "*draws n"], gap: Float[np.ndarray, "*draws n"], axis: int = -1) -> Any:
    return 1 - left.mean(axis) / gap.mean(axis)


def relative_reduction(before: Sequence[bool], after: Sequence[bool]) -> float:
    """(rate before - rate after) / rate before, paired over the same prompts. NaN where nothing was there to reduce."""
    return paired_reduction(before, after, resamples=1).value


def relative_reduction_interval(
    before: Sequence[bool], after: Sequence[bool], *, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of `relative_reduction`; see `paired_reduction`."""
    found = paired_reduction(before, after, resamples=resamples, seed=seed)
    return found.low, found.high


def paired_p_value(before: Sequence[bool], after: Sequence[bool]) -> float:
    """McNemar's exact test: how likely so uneven a split of the changed prompts is if both arms were alike."""
    first, second = (side[0].astype(bool) for side in _pair(before, after))
    table = [[int((a & b).sum()) for b in (second, ~second)] for a in (first, ~first)]
    return float(mcnemar(table, exact=True).pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def _table(flags: Flags) -> Float[np.ndarray, "n_seeds n_prompts"]:
    try:
        table = np.atleast_2d(np.asarray(flags, dtype=float))
    except ValueError as error:
        raise ValueError("flags: expected equally many prompts for every seed, got rows of unequal lengths") from error
    if table.ndim != 2 or not table.size or not np.isin(table, (0.0, 1.0)).all():
        raise ValueError(f"flags: expected booleans of shape [n_prompts] or [n_seeds, n_prompts], got an array of shape {table.shape}")
    return table


def _pair(before: Flags, after: Flags) -> tuple[Float[np.ndarray, "n_seeds n_prompts"], Float[np.ndarray, "n_seeds n_prompts"]]:
    if len(before) == 0 or len(before) != len(after):
        raise ValueError(f"paired: expected two equally long, non-empty lists, got {len(before)} and {len(after)}")
    first, second = _table(before), _table(after)
    if first.shape != second.shape:
        raise ValueError(f"paired: expected the same seeds and prompts in both arms, got shapes {first.shape} and {second.shape}")
    return first, second


def _bootstrap(
    before: Float[np.ndarray, "n_seeds n_prompts"], after: Float[np.ndarray, "n_seeds n_prompts"], resamples: int, seed: int
) -> _Weighted:
    """Both arms' rates under random weights on prompts and, independently, on seeds (the Bayesian form of Owen's pigeonhole bootstrap).

    Four pseudo-outcomes of weight 1/4 keep intervals from collapsing to a point where an arm is all zeros or all ones.
    """
    draw = np.random.default_rng(seed)
    prompts = draw.gamma(1.0, size=(resamples, before.shape[1]))
    seeds = draw.dirichlet(np.ones(before.shape[0]), size=resamples)
    both, first, second, _ = pseudo = draw.gamma(_PSEUDO, size=(4, resamples))
    total = prompts.sum(1) + pseudo.sum(0)
    start, end = (np.einsum("rs,sp,rp->r", seeds, arm, prompts, optimize=True) for arm in (before, after))
    return (start + both + first) / total, (end + both + second) / total


# ------------------------------------------------------------------------------------------------ judges, domains, planning


def agreement(first: Sequence[str], second: Sequence[str]) -> Estimate:
    """Cohen's kappa of two judges' labels for the same replies, with its 95 % interval.

    1 where both always say the same one label; 0 where only one of them does, since it tells no two replies apart. Neither has an interval.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"agreement: expected two equally long, non-empty lists of labels, got {len(first)} and {len(second)}")
    names = sorted({*first, *second})
    if len(names) == 1:
        return Estimate(value=1.0, low=math.nan, high=1.0, n=len(first))
    if 1 in (len(set(first)), len(set(second))):
        return Estimate(value=0.0, low=math.nan, high=math.nan, n=len(first))
    table = np.zeros((len(names), len(names)))
    for one, other in zip(first, second, strict=True):
        table[names.index(one), names.index(other)] += 1
    found: Any = cohens_kappa(table)
    return Estimate(value=float(found.kappa), low=float(found.kappa_low), high=float(found.kappa_upp), n=len(first))


def mean_over_domains(values: Sequence[float]) -> tuple[Estimate, float]:
    """(mean with its 95 % t interval, SEM) of one number per domain, as in the paper's figures."""
    if len(values) < 2:
        raise ValueError(f"mean over domains: expected at least two domains, got {len(values)}: one has no spread")
    if not np.isfinite(values).all():
        raise ValueError(f"mean over domains: expected finite numbers, got {list(values)}")
    mean, sem = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    half = float(t.ppf(0.975, len(values) - 1)) * sem
    return Estimate(value=mean, low=mean - half, high=mean + half, n=len(values)), sem


def minimal_detectable_effect(n: int, rate: float, *, power: float = 0.8, correlation: float = 0.0) -> float:
    """The smallest fall of a rate from ``rate`` on ``n`` prompts that is found (two-sided 5 %) with the given power; NaN if none is.

    correlation: between the two arms over prompts, 0 for unrelated answers; pairing buys 1 / (1 - correlation) as many prompts.
    """
    if n < 2 or not 0 < rate <= 1 or not 0 < power < 1 or not 0 <= correlation < 1:
        raise ValueError("minimal detectable effect: expected n >= 2, 0 < rate <= 1, 0 < power < 1 and 0 <= correlation < 1")
    effect = float(NormalIndPower().solve_power(nobs1=n / (1 - correlation), alpha=0.05, power=power, ratio=1.0))
    angle = 2 * math.asin(math.sqrt(rate)) - effect
    return rate - math.sin(angle / 2) ** 2 if angle >= 0 else math.nan
