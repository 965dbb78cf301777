"""Coverage of 95 % intervals: Wilson's exactly, the clustered paired bootstrap by simulation.

    python experiments/benchmarks/interval_coverage.py --json coverage.json

The simulated truth has prompts of unequal difficulty, training seeds that differ, and the same prompts under both arms.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy.stats import binom

from blockem_tl.evaluation.statistics import Rate, paired_difference, paired_reduction
from blockem_tl.storage import files

WORLDS = {  # logits: baseline, effect of the second arm, spread of seeds
    "40 % to 20 %, seeds alike": (-0.4, -1.5, 0.0),
    "40 % to 20 %, seeds differ": (-0.4, -1.5, 0.4),
    "40 % to 20 %, seeds differ much": (-0.4, -1.5, 0.8),
    "40 % to 3 %, seeds differ": (-0.4, -4.0, 0.4),
    "no effect, seeds differ": (-0.4, 0.0, 0.4),
    "75 % to 5 %, seeds differ": (1.5, -6.0, 0.4),
    "18 % to 9 %, seeds differ": (-2.0, -1.0, 0.4),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the simulation."""

    n: int = 29
    seeds: int = 3
    runs: int = 1000
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None


def wilson(n: int) -> dict[str, float]:
    """Coverage of Wilson's interval for p = 0.01 ... 0.99, summed over all outcomes."""
    intervals = [Rate(k=k, n=n).interval for k in range(n + 1)]
    ps = np.arange(1, 100) / 100
    covers = [sum(float(binom.pmf(k, n, p)) for k, (low, high) in enumerate(intervals) if low <= p <= high) for p in ps]
    worst = int(np.argmin(covers))
    return {"least": float(covers[worst]), "least_at": float(ps[worst]), "mean": float(np.mean(covers))}


def rates(draw: np.random.Generator, logit: np.ndarray, spread: float, seeds: int) -> np.ndarray:
    """[seeds, prompts] of booleans: each seed has its own level and its own way with each prompt."""
    shift = draw.normal(0, spread, (seeds, 1)) + draw.normal(0, 0.5, (seeds, len(logit)))
    return draw.random((seeds, len(logit))) < 1 / (1 + np.exp(-(logit + shift)))


def bootstrap(world: tuple[float, float, float], settings: Settings) -> dict[str, float]:
    """Coverage of both paired bootstraps in one world, and their mean widths."""
    base, effect, spread = world
    draw = np.random.default_rng(0)
    many = draw.normal(0, 1.5, 400_000)
    start, end = (float(rates(draw, level + many, spread_of_one, 1).mean()) for level, spread_of_one in _each(base, effect, spread))
    hits, widths, naive = np.zeros(2), np.zeros(2), 0
    for run in range(settings.runs):
        prompts = draw.normal(0, 1.5, settings.n)
        before, after = (rates(draw, level + prompts, spread, settings.seeds).tolist() for level in (base, base + effect))
        for i, (function, truth) in enumerate(((paired_difference, end - start), (paired_reduction, (start - end) / start))):
            found = function(before, after, resamples=1000, seed=run)
            hits[i] += found.low <= truth <= found.high or np.isnan(found.low)
            widths[i] += np.nan_to_num(found.high - found.low)
        low, high = prompts_only(draw, np.array(after, float).mean(0) - np.array(before, float).mean(0))
        naive += low <= end - start <= high
    names = ("difference", "difference_width", "reduction", "reduction_width")
    found = dict(zip(names, (float(x) / settings.runs for pair in zip(hits, widths, strict=True) for x in pair), strict=True))
    return {**found, "prompts_only": naive / settings.runs}


def prompts_only(draw: np.random.Generator, differences: np.ndarray) -> tuple[float, float]:
    """The plain percentile bootstrap of the difference over prompts, seeds averaged beforehand: what clustering is compared with."""
    low, high = np.percentile(differences[draw.integers(len(differences), size=(1000, len(differences)))].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _each(base: float, effect: float, spread: float) -> list[tuple[np.ndarray | float, float]]:
    """The two arms' levels for the truth: one draw of the seed's level for every one of many prompts."""
    shift = np.random.default_rng(1).normal(0, spread, 400_000)
    return [(base + shift, 0.0), (base + effect + shift, 0.0)]


def run(settings: Settings) -> dict[str, Any]:
    """Everything."""
    return {"wilson": wilson(settings.n), "bootstrap": {name: bootstrap(world, settings) for name, world in WORLDS.items()}}


if __name__ == "__main__":
    settings = tyro.cli(Settings, description=__doc__)
    result = run(settings)
    if settings.json_path is not None:
        files.write_json(settings.json_path, result)
    found = result["wilson"]
    print(f"Wilson, n = {settings.n}: at least {found['least']:.3f} (at p = {found['least_at']}), {found['mean']:.3f} on average")
    for name, row in result["bootstrap"].items():
        clustered = f"difference {row['difference']:.3f}, relative reduction {row['reduction']:.3f}"
        print(f"{name}: {clustered}; difference, resampling prompts alone {row['prompts_only']:.3f}")
