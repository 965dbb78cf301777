"""Tables, figures and pages of experiments/reemergence.py, from its data frames."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from arms import cell
from publish import ROOT, renew

from blockem_tl import plots, records, report

EPOCHS = (0.5, 1.0, 2.0, 3.0, 4.0)  # of the table; the CSV has all


@dataclass(frozen=True, kw_only=True)
class Results:
    """curves: a row per arm and epoch.  patched: a row per arm and patch.  dissected: a row per seed.  arm: the one that was dissected."""

    curves: pd.DataFrame
    patched: pd.DataFrame
    dissected: pd.DataFrame
    arm: str


def write(out: Path, results: Results, *, publish: bool, root: Path = ROOT) -> None:
    """CSV files, tables and figures in ``out``; with ``publish`` also in docs/results/reemergence/ and docs/reemergence.md."""
    curves = report.markdown(curve_rows(results.curves))
    patched = report.markdown([patched_row(row) for row in results.patched.to_dict("records")])
    dissected = report.markdown([dissected_row(row) for row in results.dissected.to_dict("records")])
    files = {
        "curves.csv": results.curves.to_csv(index=False),
        "patched.csv": results.patched.to_csv(index=False),
        "dissected.csv": results.dissected.to_csv(index=False),
        "curves.md": curves,
        "patched.md": patched,
        "dissected.md": dissected,
    }
    for name, text in files.items():
        records.write_text(out / name, text)
    plots.save(plots.reemergence(results.curves), out / "reemergence.png")
    shown = results.patched[(results.patched["arm"] == results.arm)]
    blocked = shown[(shown["patched"] != "decode") | (shown["site"] == "blocks.2.hook_resid_post")]
    plots.save(plots.patching(pd.DataFrame(blocked)), out / "patched.png")
    report.show(curve_rows(results.curves), "EM (%) on the final prompts")
    if publish:
        target = root / "docs" / "results" / "reemergence"
        target.mkdir(parents=True, exist_ok=True)
        for name in (*files, "reemergence.png", "patched.png"):
            shutil.copyfile(out / name, target / name)
        for marker, table in (("reemergence-curves", curves), ("reemergence-patched", patched), ("reemergence-dissected", dissected)):
            renew(root / "docs" / "reemergence.md", marker, table)


def curve_rows(curves: pd.DataFrame) -> list[dict[str, str]]:
    """One row per arm: EM over epochs, and at the end the rise since epoch 1, incoherence, adherence and losses."""
    rows = []
    for label, frame in curves.groupby("label", sort=False):
        by_epoch = {row["epoch"]: row for row in frame.to_dict("records")}
        last = by_epoch[max(by_epoch)]
        row = {"arm": str(label)} | {f"EM %, epoch {e:g}": cell(by_epoch[e], "em") for e in EPOCHS if e in by_epoch}
        row |= {"since epoch 1, points": cell(last, "rise"), "incoherence %": cell(last, "incoherence")}
        row |= {
            "adherence %": cell(last, "adherence"),
            "SFT loss": f"{last['sft_loss']:.4f}",
            "blocking loss": f"{last['blocking_loss']:.2g}",
        }
        rows.append(row | {"EM by seed %": _by_seed(last["em_by_seed"])})
    return rows


def patched_row(row: dict[str, Any]) -> dict[str, str]:
    """One patch."""
    what = {"nothing": "nothing", "prompt": "the prompt", "decode": "every decoding step"}[row["patched"]]
    place = {"arm": row["arm"], "patched": what, "site": row["site"]}
    return place | {"EM %": cell(row, "em"), "change, points": cell(row, "change"), "incoherence %": cell(row, "incoherence")}


def dissected_row(row: dict[str, Any]) -> dict[str, str]:
    """One seed."""

    def pair(name: str) -> str:
        return f"{row[f'{name}_core_em']:.1f} / {row[f'{name}_em']:.1f}"

    known = "score_added" in row and row["score_added"] == row["score_added"]  # NaN where another seed has one
    return {
        "seed": str(row["seed"]),
        "checkpoint": f"{row['arm']}, epoch {row['epoch']:g}",
        "core / final EM % at epoch 1": pair("before"),
        "at that epoch": pair("reemerged"),
        "the same with K extended": pair("extended"),
        "mean score of K": f"{row['score_k']:.3f}",
        "of K_reem": f"{row['score_added']:.3f}" if known else "",
        "capacity ratio": f"{row['score_added'] / row['score_k']:.2f}" if known else "",
    }


def _by_seed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)
