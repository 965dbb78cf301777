"""Intervals: no rate is printed without its n and its 95 % interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True, kw_only=True)
class Rate:
    """k of n as a fraction, with its 95 % Wilson score interval."""

    k: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.n or self.n < 1:
            raise ValueError(f"rate: expected 0 <= k <= n and n >= 1, got k={self.k}, n={self.n}")

    @property
    def value(self) -> float:
        return self.k / self.n

    @property
    def interval(self) -> tuple[float, float]:
        found = binomtest(self.k, self.n).proportion_ci(confidence_level=0.95, method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n = {self.n})"


def relative_reduction(before: Sequence[bool], after: Sequence[bool]) -> float:
    """(rate before - rate after) / rate before, paired over the same prompts. NaN where nothing was there to reduce."""
    if len(before) != len(after) or not before:
        raise ValueError(f"relative reduction: expected two equally long, non-empty lists, got {len(before)} and {len(after)}")
    start = float(np.mean(before))
    return (start - float(np.mean(after))) / start if start else float("nan")


def relative_reduction_interval(
    before: Sequence[bool], after: Sequence[bool], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of :func:`relative_reduction`, resampling prompts (both arms together, as they are paired)."""
    relative_reduction(before, after)
    draws = np.random.default_rng(seed).integers(len(before), size=(resamples, len(before)))
    start, end = np.asarray(before, dtype=float)[draws].mean(1), np.asarray(after, dtype=float)[draws].mean(1)
    values = (start[start > 0] - end[start > 0]) / start[start > 0]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
