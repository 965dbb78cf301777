"""Figures that compare trained arms: the safety-quality trade-off, defences, watching, and re-emergence over training."""

from typing import cast

import pandas as pd
from matplotlib.axes import Axes

from blockem_tl.views.figures import Figure

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
    figure = Figure(figsize=(11, 4.2), layout="constrained")
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
    """Every defence at its best strength, and every strength that was tried, against the in-domain loss.

    Args:
        arms: one row per arm: kind, label, sft_loss, em, em_low, em_high and, but for base and plain, matched_loss, matched_em.
        grid: one row per strength: kind, label, dev_loss, core_em, core_incoherence.
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
        title="Best strengths, reporting prompts",
    )
    left.set_xscale("log")
    left.legend(fontsize=7)
    for kind, rows in grid.groupby("kind", sort=False):
        ordered = rows.sort_values("dev_loss")
        right.plot(ordered["dev_loss"], ordered["core_em"] + ordered["core_incoherence"], label=kind, **_look(str(kind)))
    right.set(
        xlabel="dev loss (nats per token)", ylabel="EM + incoherence (%)", ylim=(-3, 103), title="All strengths, core prompts, first seed"
    )
    right.set_xscale("log")
    right.legend(fontsize=7)
    return figure


def watched(runs: pd.DataFrame, *, threshold: float) -> Figure:
    """Movement of a monitored latent set, and EM, over the first steps.

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


def _look(kind: str) -> dict[str, str]:
    place = _DEFENCES.index(kind) if kind in _DEFENCES else 0
    return {"color": f"C{place % 10}", "marker": "o*^sDPXvp<>"[place]}
