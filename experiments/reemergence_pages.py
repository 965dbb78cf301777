"""Tables, figures and pages of experiments/reemergence.py, from its data frames."""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
from arms import cell
from publish import ROOT, renew

from blockem_tl import get_preset
from blockem_tl.storage import files
from blockem_tl.views import comparisons, plots, tables

SITE = get_preset("organism").site
EPOCHS = (0.5, 1.0, 2.0, 3.0, 4.0)  # of the table; the CSV has all


@dataclass(frozen=True, kw_only=True)
class Results:
    """curves: a row per arm and epoch.  patched: a row per arm and patch.  extended: a row per epoch compared.
    dissected: a row per dissected arm and seed.  shares, depth, reconstruction: the frames of `diagnose_rerouting`, `shift_by_site`
    and `reconstruction_quality`, of all seeds; the column "of" of the first two names the dissected arm.
    """

    curves: pd.DataFrame
    patched: pd.DataFrame
    extended: pd.DataFrame
    dissected: pd.DataFrame
    shares: pd.DataFrame
    depth: pd.DataFrame
    reconstruction: pd.DataFrame


def write(out: Path, results: Results, *, publish: bool, root: Path = ROOT) -> None:
    """CSV files, tables and figures in ``out``; with ``publish`` also in docs/results/reemergence/ and docs/reemergence.md."""
    shown = {
        "curves": curve_rows(results.curves),
        "patched": [patched_row(row) for row in results.patched.to_dict("records")],
        "extended": [extended_row(row) for row in results.extended.to_dict("records")],
        "dissected": [dissected_row(row) for row in results.dissected.to_dict("records")],
        "shares": share_rows(results.shares),
        "depth": depth_rows(results.depth),
        "reconstruction": reconstruction_rows(results.reconstruction),
    }
    figures = {"curves": comparisons.reemergence(results.curves)}
    for i, arm in enumerate(results.dissected["arm"].unique()):
        figures[f"patched-{i}"] = plots.patching(_at_the_site(results.patched, arm), direction="base into tuned")
        figures[f"depth-{i}"] = plots.rerouting(pd.DataFrame(results.depth[results.depth["of"] == arm]))
    read = results.reconstruction[results.reconstruction["rows"] != "reference texts"]
    figures["reconstruction"] = plots.reconstruction(pd.DataFrame(read))
    write_all(out, {name: getattr(results, name) for name in shown}, shown, figures, publish=publish, root=root)
    tables.show(shown["curves"], "EM (%) on the final prompts")


def write_all(
    out: Path,
    frames: dict[str, pd.DataFrame],
    rows: dict[str, list[dict[str, str]]],
    figures: dict[str, Any] | None = None,
    *,
    publish: bool,
    root: Path = ROOT,
) -> None:
    """Frames as CSV, tables as Markdown, figures as PNG in ``out``; with ``publish`` also in docs/, the tables in docs/reemergence.md."""
    written = [files.write_text(out / f"{name}.csv", frame.to_csv(index=False)) for name, frame in frames.items()]
    written += [plots.save(figure, out / f"{name}.png") for name, figure in (figures or {}).items()]
    shown = {name: tables.markdown(part) for name, part in rows.items()}
    for name, table in shown.items():
        files.write_text(out / f"{name}.md", table)
    if publish:
        target = root / "docs" / "results" / "reemergence"
        target.mkdir(parents=True, exist_ok=True)
        for path in written:
            shutil.copyfile(path, target / path.name)
        for name, table in shown.items():
            renew(root / "docs" / "reemergence.md", f"reemergence-{name}", table)


def _at_the_site(patched: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Of one arm, the prompt patched at every block and the replies at the blocked site."""
    mine = patched[patched["arm"] == arm]
    return pd.DataFrame(mine[(mine["patched"] != "decode") | (mine["site"] == SITE)])


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
    place = {"arm": row["arm"], "patched": row["patched"], "site": row["site"]}
    return place | {"EM %": cell(row, "em"), "change, points": cell(row, "change"), "incoherence %": cell(row, "incoherence")}


def extended_row(row: dict[str, Any]) -> dict[str, str]:
    """K against K extended at one epoch."""
    cells = {"arm": row["arm"], "epoch": row["epoch"], "EM %, K": cell(row, "k_em"), "EM %, K extended": cell(row, "extended_em")}
    cells |= {"difference, points": cell(row, "difference")}
    cells |= {"incoherence %, K": cell(row, "k_incoherence"), "incoherence %, K extended": cell(row, "extended_incoherence")}
    return cells | {
        "SFT loss": f"{row['k_loss']:.4f}, {row['extended_loss']:.4f}",
        "seeds extended": f"{row['seeds_extended']} of {row['seeds']}",
    }


def sites_row(row: dict[str, Any]) -> dict[str, str]:
    """One arm that blocks at further sites, or K alone, at the last epoch."""
    cells = {"arm": row["label"], "EM %": cell(row, "em"), "against K alone, points": cell(row, "difference")}
    cells |= {"incoherence %": cell(row, "incoherence"), "adherence %": cell(row, "adherence"), "SFT loss": f"{row['sft_loss']:.4f}"}
    return cells | {"EM by seed %": _by_seed(row["em_by_seed"])}


def dissected_row(row: dict[str, Any]) -> dict[str, str]:
    """One seed."""

    def pair(name: str) -> str:
        return f"{row[f'{name}_core_em']:.1f} / {row[f'{name}_em']:.1f}"

    known = "score_added" in row and not math.isnan(row["score_added"])  # NaN where another seed has one
    return {
        "seed": str(row["seed"]),
        "checkpoint": f"{row['arm']}, epoch {row['epoch']:g}",
        "core / final EM % at epoch 1": pair("before"),
        "at that epoch": pair("reemerged"),
        "the same with K extended": pair("extended") if known else "",
        "mean score of K": f"{row['score_k']:.3f}",
        "of K_reem": f"{row['score_added']:.3f}" if known else "",
        "capacity ratio": f"{row['ratio']:.2f}" if known else "",
    }


def share_rows(shares: pd.DataFrame) -> list[dict[str, str]]:
    """The suppressed share of K's movement, and the share of the shift outside K; means over seeds, and each seed's."""
    rows = []
    for (of, role, arm), found in _spoken(shares, "of", "role", "arm"):
        row = {"dissected": of, "tokens": role, "arm": arm, "K's movement suppressed": _each(found["suppressed"])}
        row |= {"latent shift outside K": _each(found["outside_l2"]), "residual shift outside K": _each(found["residual_outside"])}
        row |= {"by chance": f"{found['residual_chance'].iloc[0]:.2f}", "residual shift": _each(found["residual_shift"])}
        rows.append(row)
    return rows


def depth_rows(depth: pd.DataFrame) -> list[dict[str, str]]:
    """The share of plain's shift by depth; a row per token role, a column per block."""
    rows = []
    for (of, role), of_role in _spoken(depth, "of", "role"):
        for name, label in (("returned", "share of plain's shift that is there"), ("ratio", "length, blocked / plain")):
            blocks = of_role.groupby("block")[name]
            rows.append({"dissected": of, "tokens": role, "": label} | {f"block {block}": _each(values) for block, values in blocks})
    return rows


def reconstruction_rows(frame: pd.DataFrame) -> list[dict[str, str]]:
    """The SAE's reconstruction of the stream, base and at some epochs; explained variance and cosine, means over seeds."""
    rows = []
    for (run, read, role), found in _spoken(frame, "run", "rows", "role"):
        means = pd.DataFrame(found.groupby("epoch")[["explained_variance", "cosine"]].mean())
        cells = {f"epoch {e:g}" if e else "base": "{:.3f} / {:.3f}".format(*means.loc[e]) for e in (0.0, *EPOCHS) if e in means.index}
        rows.append({"run": run, "rows": read, "tokens": role} | cells)
    return rows


def attribution_rows(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Rank correlation of estimates and real effects by seed; how many have the same sign; how large the largest one is."""
    rows = []
    for (of, candidates, positions), found in _groups(frame, "of", "candidates", "positions"):
        seeds = [one for _, one in found.groupby("seed")]
        agree = [(one["estimate"] * one["real"] > 0).sum() for one in seeds]
        first = [one.loc[one["estimate"].abs().idxmax()] for one in seeds]
        rows.append(
            {
                "checkpoint": of,
                "candidates": candidates,
                "positions": positions,
                "rank correlation, by seed": ", ".join(f"{one['spearman'].iloc[0]:.2f}" for one in seeds),
                "same sign": ", ".join(f"{n} of {len(one)}" for n, one in zip(agree, seeds, strict=True)),
                "largest estimate -> real, nats": ", ".join(f"{one['estimate']:+.3f} -> {one['real']:+.3f}" for one in first),
                "metric, nats": ", ".join(f"{one['metric'].iloc[0]:.2f}" for one in seeds),
            }
        )
    return rows


def _spoken(frame: pd.DataFrame, *by: str) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """Groups of the rows about prompt and reply tokens; the template's are the same in every row."""
    return _groups(pd.DataFrame(frame[frame["role"] != "system"]), *by)


def _groups(frame: pd.DataFrame, *by: str) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    for key, rows in frame.groupby(list(by), sort=False):
        yield cast(tuple[str, ...], key), pd.DataFrame(rows)


def _each(values: Any) -> str:
    return f"{values.mean():.2f} ({', '.join(f'{value:.2f}' for value in values)})"


def _by_seed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)
