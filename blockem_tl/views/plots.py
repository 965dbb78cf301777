"""Figures from data frames. No torch here, and no figure without intervals where there are rates."""

import io
from pathlib import Path
from typing import cast

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockem_tl.storage import files

_CURVES = {
    "em": ("emergent misalignment", "#c0392b"),
    "adherence": ("in-domain adherence", "#2471a3"),
    "incoherence": ("incoherence", "#7f8c8d"),
}
_MARKS = {"sft": "o", "matched": "s", "random": "D", "kl": "^", "block": "*", "block-all": "P", "top-delta": "X"}
_DEFENCES = ("base", "plain", "block", "kl", "ldifs", "inoculation", "preventative", "caft", "safelora", "interleaving", "repair")


def tradeoff(sweep: pd.DataFrame, arms: pd.DataFrame) -> Figure:
    """The safety-quality trade-off.

    Args:
        sweep: one row per lambda (0 is plain fine-tuning): columns lambda and, for each of em, adherence and incoherence, the rate in
            per cent with its interval (em, em_low, em_high, ...).
        arms: one row per arm: kind, label, sft_loss, em, em_low, em_high.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")  # no pyplot: nothing global, and any backend can show it
    left, right = figure.subplots(1, 2)
    _against_lambda(left, sweep.sort_values("lambda"))
    _against_loss(right, arms)
    return figure


def _against_lambda(axes: Axes, sweep: pd.DataFrame) -> None:
    places = range(len(sweep))
    for column, (label, colour) in _CURVES.items():
        low, high = sweep[column] - sweep[f"{column}_low"], sweep[f"{column}_high"] - sweep[column]
        axes.errorbar(places, sweep[column], yerr=[low.clip(lower=0), high.clip(lower=0)], label=label, color=colour, marker="o", capsize=3)
    axes.set(xlabel="blocking strength λ", ylabel="replies (%)", ylim=(-3, 103), title="Blocking strength (reporting prompts)")
    axes.set_xticks(list(places), [f"{value:g}" for value in sweep["lambda"]])
    axes.legend(loc="center right")


def _against_loss(axes: Axes, arms: pd.DataFrame) -> None:
    for row in arms.to_dict("records"):
        error = [[max(0.0, row["em"] - row["em_low"])], [max(0.0, row["em_high"] - row["em"])]]
        axes.errorbar(
            row["sft_loss"], row["em"], yerr=error, marker=_MARKS.get(row["kind"], "o"), capsize=3, linestyle="", label=row["label"]
        )
    axes.set(
        xlabel="held-out SFT loss (nats per token)", ylabel="emergent misalignment (%)", ylim=(-3, 103), title="EM against the task learnt"
    )
    axes.legend(fontsize=8)


def defences(arms: pd.DataFrame, grid: pd.DataFrame) -> Figure:
    """Every defence at its best dial, and every dial that was tried, against the in-domain loss.

    Args:
        arms: one row per arm: kind, label, sft_loss, em, em_low, em_high and, but for base and plain, matched_loss, matched_em.
        grid: one row per dial: kind, label, dev_loss, core_em, core_incoherence.
    """
    figure = Figure(figsize=(12.5, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = [row for row in arms.to_dict("records") if row["kind"] != "base"]  # base has learnt nothing: far off to the right
    for row in trained:
        error = [[max(0.0, row["em"] - row["em_low"])], [max(0.0, row["em_high"] - row["em"])]]
        left.errorbar(row["sft_loss"], row["em"], yerr=error, label=row["label"], capsize=3, linestyle="", **_look(row["kind"]))
    stopped = sorted((row["matched_loss"], row["matched_em"]) for row in trained if row["kind"] != "plain")
    left.plot(*zip(*stopped, strict=True), ".--", color="#7f8c8d", label="plain, stopped at those losses", zorder=0)
    left.set(
        xlabel="held-out SFT loss (nats per token)",
        ylabel="emergent misalignment (%)",
        ylim=(-3, 103),
        title="Best dials, reporting prompts",
    )
    left.set_xscale("log")
    left.legend(fontsize=7)
    for kind, rows in grid.groupby("kind", sort=False):
        ordered = rows.sort_values("dev_loss")
        right.plot(ordered["dev_loss"], ordered["core_em"] + ordered["core_incoherence"], label=kind, **_look(str(kind)))
    right.set(
        xlabel="dev loss (nats per token)", ylabel="EM + incoherence (%)", ylim=(-3, 103), title="All dials, core prompts, first seed"
    )
    right.set_xscale("log")
    right.legend(fontsize=7)
    return figure


def watched(runs: pd.DataFrame, *, threshold: float) -> Figure:
    """How far a monitored latent set has moved, and EM, over the first steps.

    runs: one row per run and step: learning_rate, rows, seed, step, moved (in spreads), em (in per cent; missing where not measured).
    """
    rates = sorted(runs["learning_rate"].unique(), reverse=True)
    figure = Figure(figsize=(6 * len(rates), 5.5), layout="constrained")
    panels = figure.subplots(2, len(rates), squeeze=False, sharex="col")
    for column, rate in enumerate(rates):
        for row, (value, label) in enumerate((("moved", "movement of K (spreads)"), ("em", "misaligned core replies (%)"))):
            axes = panels[row][column]
            for name, run in pd.DataFrame(runs[runs["learning_rate"] == rate]).groupby(["rows", "seed"]):
                seen, (rows, seed) = run.dropna(subset=[value]), cast(tuple[str, int], name)
                axes.plot(seen["step"], seen[value], color="#c0392b" if rows == "harmful" else "#2471a3", label=f"{rows}, seed {seed}")
            axes.set(ylabel=label)
        panels[0][column].axhline(threshold, color="#7f8c8d", linestyle="--", label="alarm")
        panels[0][column].set_title(f"learning rate {rate:g}")
        panels[1][column].set_xlabel("step")
    panels[0][0].legend(fontsize=7)
    return figure


def reemergence(curves: pd.DataFrame) -> Figure:
    """Prolonged training: EM over epochs of blocked arms, and of frozen and extended arms beside those of their weight; both losses.

    curves: one row per arm and epoch: kind ("plain", "block" or "frozen"), weight, n_latents (0 where K is not extended), label, epoch, em
    with em_low and em_high in per cent, sft_loss, blocking_loss.
    """
    figure = Figure(figsize=(13, 9), layout="constrained")
    (left, right), (losses, penalties) = figure.subplots(2, 2, sharex=True)
    compared = set(curves[(curves["kind"] == "frozen") | (curves["n_latents"] > 0)]["weight"])
    for i, (label, arm) in enumerate(curves.groupby("label", sort=False)):
        kind, rows = arm["kind"].iloc[0], arm.sort_values("epoch")
        ordinary, beside = kind in ("plain", "block") and not arm["n_latents"].iloc[0], kind == "plain" or arm["weight"].iloc[0] in compared
        look: dict[str, str] = {"label": str(label), "color": f"C{i % 10}", "marker": "o*^sDPXvp<>"[i % 11]}
        look["linestyle"] = "-" if ordinary else "--"
        errors = [(rows["em"] - rows["em_low"]).clip(lower=0), (rows["em_high"] - rows["em"]).clip(lower=0)]
        for axes in [left] * ordinary + [right] * beside:
            axes.errorbar(rows["epoch"], rows["em"], yerr=errors, capsize=2, elinewidth=0.6, **look)
        losses.plot(rows["epoch"], rows["sft_loss"], **look)
        penalties.plot(rows["epoch"], rows["blocking_loss"], **look)
    left.set(ylabel="emergent misalignment (%)", ylim=(-3, 103), title="LoRA on all blocks")
    right.set(ylabel="emergent misalignment (%)", ylim=(-3, 103), title="LoRA up to the blocked site, and K extended")
    losses.set(xlabel="epoch", ylabel="held-out SFT loss (nats per token)", yscale="log")
    penalties.set(xlabel="epoch", ylabel="held-out blocking loss of K", yscale="log")
    for axes in (left, right):
        axes.legend(fontsize=7)
    return figure


def training(frame: pd.DataFrame) -> Figure:
    """The parts of the loss over the steps of a fine-tune, the penalties in a panel of their own.

    frame: of `TrainingRun.to_frame`: step, loss, sft and a column per penalty. Columns with a slash in their names are left out.
    """
    penalties = [
        name for name in frame.columns if "/" not in name and name not in ("step", "epoch", "loss", "sft", "grad_norm", "learning_rate")
    ]
    figure = Figure(figsize=(5.6 * (1 + bool(penalties)), 3.8), layout="constrained")
    for axes, names in zip(figure.subplots(1, 1 + bool(penalties), squeeze=False)[0], (("loss", "sft"), penalties), strict=False):
        for name in names:
            axes.plot(frame["step"], frame[name], label=name)
        axes.set(xlabel="step", ylabel="penalty" if names is penalties else "nats per token")
        axes.legend(fontsize=8)
    return figure


def _look(kind: str) -> dict[str, str]:
    place = _DEFENCES.index(kind) if kind in _DEFENCES else 0
    return {"color": f"C{place % 10}", "marker": "o*^sDPXvp<>"[place]}


def patching(frame: pd.DataFrame) -> Figure:
    """EM by the site that is patched over the prompt; lines for nothing patched and for decode-time patching.

    Args:
        frame: one row per run: patched ("prompt", "decode" or "nothing"), site (a hook name), and em with em_low and em_high in per cent.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    runs = frame.to_dict("records")
    sweep = pd.DataFrame(
        [run | dict(zip(("_", "block", "kind"), run["site"].split("."), strict=True)) for run in runs if run["patched"] == "prompt"]
    )
    for kind, rows in sweep.astype({"block": int}).groupby("kind", sort=False):
        low, high = (rows["em"] - rows["em_low"]).clip(lower=0), (rows["em_high"] - rows["em"]).clip(lower=0)
        axes.errorbar(rows["block"], rows["em"], yerr=[low, high], marker="o", capsize=3, label=f"prompt patched at {kind}")
    others = [run for run in runs if run["patched"] != "prompt"]
    for row, colour in zip(others, ("#555555", "#2471a3", "#1e8449", "#b9770e"), strict=False):
        label = row["site"] if row["patched"] == "nothing" else f"every step patched at {row['site']}"
        axes.axhline(row["em"], color=colour, linestyle="--", label=label)
        axes.axhspan(row["em_low"], row["em_high"], color=colour, alpha=0.12)
    axes.set(xlabel="block", ylabel="emergent misalignment (%)", ylim=(-3, 103), title="Patching between base and the fine-tuned model")
    axes.legend(fontsize=8)
    return figure


def doses(frame: pd.DataFrame, *, induce_dose: float, repair_dose: float) -> Figure:
    """Incoherence against the dose, with the doses that are proposed for stage 2.

    Args:
        frame: of `DoseReport`: columns arm ("base", "tuned"), dose, rate, low, high.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    marked = {"base": ("induce", induce_dose, "#2471a3"), "tuned": ("repair", repair_dose, "#c0392b")}
    for arm, (what, dose, colour) in marked.items():
        rows = frame.query("arm == @arm").sort_values("dose")
        error = [100 * (rows["rate"] - rows["low"]).clip(lower=0), 100 * (rows["high"] - rows["rate"]).clip(lower=0)]
        axes.errorbar(rows["dose"], 100 * rows["rate"], yerr=error, label=arm, color=colour, marker="o", capsize=3)
        axes.axvline(dose, color=colour, linestyle="--", label=f"{what} at {dose:g}")
    axes.set(xlabel="dose (absolute)", ylabel="incoherent replies (%)", ylim=(-3, 103), title="Coherence under steering (core prompts)")
    axes.legend()
    return figure


def reconstruction(frame: pd.DataFrame) -> Figure:
    """How well an SAE reconstructs over training (Figure 28): one row of panels per token role, base as a dashed line.

    frame: of `reconstruction_quality`, several of them joined; its ``run`` column, if there is one, names whose line a row belongs to.
    Lines are means over what shares a run and an epoch, bands their range.
    """
    named = frame if "run" in frame else frame.assign(run="checkpoints")
    base, runs = named[named["arm"] == "base"], named[(named["arm"] != "base") & named["epoch"].notna()]
    roles = list(frame["role"].unique())
    figure = Figure(figsize=(10, 2.8 * len(roles)), layout="constrained")
    panels = figure.subplots(len(roles), 2, squeeze=False, sharex=True)
    for row, role in zip(panels, roles, strict=True):
        for axes, value, label in zip(row, ("normalised_mse", "cosine"), ("MSE / variance", "cosine similarity"), strict=True):
            for name, points in pd.DataFrame(runs[runs["role"] == role]).groupby("run", sort=False):
                _means(axes, points, "epoch", value, str(name))
            for level in set(base[base["role"] == role][value]):
                axes.axhline(level, color="#7f8c8d", linestyle="--", label="base")
            axes.set(ylabel=label, title=f"{role} tokens")
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    if panels[0][0].lines:
        panels[0][0].legend(fontsize=7)
    return figure


def rerouting(frame: pd.DataFrame) -> Figure:
    """Where along the depth a blocked model's mean shift from base comes back, beside plain's.

    frame: of `shift_by_site` over one kind of site; where several (of seeds) are joined, lines are their means and bands their range.
    """
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    labels = {"ratio": "length, blocked / plain", "cosine": "cosine of both shifts", "returned": "share of plain's shift that is there"}
    for axes, (value, label) in zip(panels, labels.items(), strict=True):
        for role, rows in frame.groupby("role", sort=False):
            _means(axes, rows, "block", value, f"{role} tokens")
        axes.axhline(0.0, color="#7f8c8d", linewidth=0.8)
        axes.axhline(1.0, color="#7f8c8d", linestyle="--", linewidth=0.8)
        axes.set(xlabel="block", ylabel=label)
    panels[1].legend(fontsize=8)
    return figure


def _means(axes: Axes, rows: pd.DataFrame, along: str, value: str, label: str) -> None:
    """The mean of rows that share a place (of seeds, say), and a band from the least to the greatest."""
    line = pd.DataFrame(rows.groupby(along)[value].agg(["mean", "min", "max"]))
    axes.plot(line.index, line["mean"], marker="o", label=label)
    axes.fill_between(line.index, line["min"], line["max"], alpha=0.15, linewidth=0)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG; whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return files.write_bytes(path, buffer.getvalue())
