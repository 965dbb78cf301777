"""What became of each of the paper's claims? One table from the results that are published (docs/results.md).

    python experiments/claims.py --preset organism --publish

claims.yaml says for each where its numbers lie and should lie: part of a published table, a column, a bound. A claim holds if each number's
whole interval lies beyond its bound (and the bound's), does not if no estimate does, and holds in part otherwise. Nothing is measured.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
import yaml

from blockem_tl.evaluation.statistics import mean_over_domains
from blockem_tl.study.page import Page

CLAIMS = Path(__file__).with_name("claims.yaml")


@dataclass(frozen=True, kw_only=True)
class Options:
    """results: published pages, or those in results/.  out: results/claims-PRESET by default.  publish: also renew docs/results.md."""

    preset: str = "organism"
    results: Path = Path("docs/results")
    out: Path | None = None
    publish: bool = False


def number(rows: pd.DataFrame, column: str, pick: str = "") -> tuple[float, ...]:
    """The column's estimate, with the ends of its interval, in the only row, the one that is picked ("max", "min"), or their "mean"."""
    if pick == "mean" and len(rows) == 1:  # of one seed, which has no interval
        return float(rows[column].iloc[0]), -float("inf"), float("inf")
    if pick == "mean":
        mean, _ = mean_over_domains(rows[column].tolist())
        return mean.value, mean.low, mean.high
    if not pick and len(rows) != 1:
        raise ValueError(f"claims.yaml: expected one row, or a pick, got {len(rows)} rows of {column!r}")
    one = rows.loc[rows[column].agg(f"idx{pick}")] if pick else rows.iloc[0]
    return tuple(float(one.get(name, one[column])) for name in (column, f"{column}_low", f"{column}_high"))


def part(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """The rows of a query. Raises ValueError if there are none."""
    if (found := table.query(where)).empty:
        raise ValueError(f"claims.yaml: no row fits {where!r} in a table with the columns {list(table)}")
    return found


def bound_of(table: pd.DataFrame, check: dict[str, Any], side: str) -> tuple[float, ...]:
    """A number, or another row's, times or less something."""
    bound = check[side]
    if not isinstance(bound, dict):
        return bound, bound, bound
    other = number(part(table, bound.get("rows", check["rows"])), bound.get("value", check["value"]), bound.get("pick", ""))
    return tuple(bound.get("times", 1.0) * end + bound.get("plus", 0.0) for end in other)


def checked(table: pd.DataFrame, check: dict[str, Any]) -> tuple[str, float]:
    """The number as people read it beside its bound, and how far it is there: 1 with its whole interval, 0.5 its estimate, 0 not."""
    side = "above" if "above" in check else "below"
    rows = part(table, check["rows"])
    mine, bound = number(rows, check["value"], check.get("pick", "")), bound_of(table, check, side)
    n = "".join(f", {name} = {rows[name].iloc[0]:g}" for name in ("n", "domains", "seeds") if name in rows)
    surely = mine[1] > bound[2] if side == "above" else mine[2] < bound[1]
    likely = mine[0] > bound[0] if side == "above" else mine[0] < bound[0]
    unit, factor = check.get("unit", ""), check.get("scale", 1.0)

    def shown(one: tuple[float, ...]) -> str:
        estimate, low, high = (f"{factor * value:.{1 if unit else 3}f}" for value in one)
        return f"{estimate} [{low}, {high}]" if 0 < one[2] - one[1] < float("inf") else estimate

    reached = 1.0 if surely else 0.5 if likely else 0.0 * (mine[0] + bound[0])  # NaN where there is nothing to compare
    return f"{check['name']} {shown(mine)}{unit} ({side} {shown(bound)}{n})", reached


def row(claim: dict[str, Any], options: Options) -> dict[str, Any]:
    """One claim."""
    about = {"claim": claim["claim"], "the paper": claim["says"], "its numbers": claim.get("paper", "")}
    if options.preset in claim.get("cannot", {}):
        return {**about, "here": claim["cannot"][options.preset], "verdict": "cannot be tested here"}
    if not (place := options.results / f"{claim.get('from', '').format(preset=options.preset)}.csv").is_file():
        return {**about, "here": claim["by"], "verdict": "not run yet"}
    texts, reached = zip(*(checked(pd.read_csv(place), check) for check in claim["checks"]), strict=True)
    verdict = "holds" if min(reached) == 1 else "does not hold" if max(reached) == 0 else "in part"
    return {**about, "here": "; ".join(texts), "verdict": "cannot be tested here" if any(map(pd.isna, reached)) else verdict}


def main(options: Options) -> None:
    """The table."""
    name = f"claims-{options.preset}"
    page = Page(options.out or Path("results") / name, docs=Path("docs") if options.publish else None, name=name)
    page.add("claims", pd.DataFrame([row(claim, options) for claim in yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
