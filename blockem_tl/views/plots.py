"""Figures from data frames. No torch here, and no figure without intervals where there are rates."""

import io
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from blockem_tl.storage import files
from blockem_tl.views.figures import Figure

_LINES = ("#555555", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#a93226")


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


def patching(frame: pd.DataFrame, *, direction: str = "") -> Figure:
    """EM by the site that is patched over the prompt; lines for the unpatched replies and for decode patching at single sites.

    Args:
        frame: one row per run: patched ("prompt", "decode" or "unpatched"), site (a hook name), and em with em_low and em_high in per cent.
        direction: for the title: "base into tuned".

    Raises:
        ValueError: a frame without these columns, such as that of `Replies.rates`, which `rates` draws.
    """
    missing = [name for name in ("patched", "site", "em", "em_low", "em_high") if name not in frame]
    if missing:
        raise ValueError(f"patching: expected the columns {missing}, got {list(frame)}; rates of a sweep are drawn by replies.plot()")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    placed = _placed(frame)
    several = (frame["patched"] == "decode").sum() > 1
    swept = placed[placed["block"].notna() & ((placed["patched"] == "prompt") | ((placed["patched"] == "decode") & several))]
    for key, rows in pd.DataFrame(swept).groupby(["patched", "kind"], sort=False):
        patched, kind = cast(tuple[str, str], key)
        low, high = (rows["em"] - rows["em_low"]).clip(lower=0), (rows["em_high"] - rows["em"]).clip(lower=0)
        axes.errorbar(rows["block"], rows["em"], yerr=[low, high], marker="o", capsize=3, label=f"{patched} patching, {kind}")
    others = placed.drop(swept.index).to_dict("records")
    for i, row in enumerate(others):
        colour = _LINES[i % len(_LINES)]
        label = row["site"] if row["patched"] == "unpatched" else f"{row['patched']} patching, {row['site']}"
        axes.axhline(row["em"], color=colour, linestyle=("--", ":", "-.")[i // len(_LINES) % 3], label=label)
        axes.axhspan(row["em_low"], row["em_high"], color=colour, alpha=0.12)
    title = f"Patching {direction or 'between base and the fine-tuned model'}"
    axes.set(xlabel="block", ylabel="emergent misalignment (%)", ylim=(-3, 103), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    return figure


def patching_map(frame: pd.DataFrame, *, value: str = "misaligned", direction: str = "") -> Figure:
    """A heat map of a patching sweep: blocks along it, what was patched (prompt or decode, and which hook point) from top to bottom.

    Args:
        frame: ``replies.rates(by=["patched", "site"])``: shares of replies, as fractions. Sites outside of the blocks, and groups of sites,
            have no cell.
        value: the share that is shown.
        direction: for the title: "base into tuned".

    Raises:
        ValueError: a frame without these columns, or without a site in a block.
    """
    missing = [name for name in ("patched", "site", value) if name not in frame]
    placed = None if missing else _placed(frame).dropna(subset="block")
    if placed is None or placed.empty:
        raise ValueError(f"patching map: expected replies.rates(by=['patched', 'site']) of a sweep, got the columns {list(frame)}")
    cells = placed.assign(row=placed["patched"] + ", " + placed["kind"], block=placed["block"].astype(int))
    table = 100 * cells.pivot(index="row", columns="block", values=value).loc[list(dict.fromkeys(cells["row"]))]
    figure = Figure(figsize=(2.8 + 0.7 * len(table.columns), 1.6 + 0.45 * len(table)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(table, cmap="Reds", vmin=0, vmax=100, aspect="auto")
    for (i, j), percent in np.ndenumerate(table.to_numpy()):
        axes.text(j, i, "" if np.isnan(percent) else f"{percent:.0f}", ha="center", va="center", color="white" if percent > 60 else "black")
    axes.set_xticks(range(len(table.columns)), [str(block) for block in table.columns])
    axes.set_yticks(range(len(table)), list(table.index))
    unpatched = frame.loc[frame["patched"] == "unpatched", value]
    beside = f"; unpatched {100 * unpatched.iloc[0]:.0f} %" if len(unpatched) else ""
    axes.set(xlabel="block", title=f"Patching {direction or 'between base and the fine-tuned model'}{beside}")
    figure.colorbar(shown, label=f"{value} (%)")
    return figure


def _placed(frame: pd.DataFrame) -> pd.DataFrame:
    """With the block and the kind of each site, NaN for what is not in one block."""
    parts = frame["site"].str.extract(r"^blocks\.(\d+)\.([\w.]+)$")
    return frame.assign(block=parts[0].astype(float), kind=parts[1])


def rates(frame: pd.DataFrame, *, by: str, direction: str = "") -> Figure:
    """A bar per group for misalignment (or adherence) and incoherence, with 95 % intervals; along the blocks if groups are sites.

    Args:
        frame: of `Replies.rates`: the column ``by``, and misaligned (or adherent) and incoherent, with _low and _high, as fractions.
        direction: of a patching sweep, for its title.
    """
    name = "misaligned" if "misaligned" in frame else "adherent"
    if by == "site" and "patched" in frame:
        shown = {column: 100 * frame[f"{name}{ending}"] for column, ending in (("em", ""), ("em_low", "_low"), ("em_high", "_high"))}
        return patching(frame.assign(**shown), direction=direction)
    figure = Figure(figsize=(max(5.0, 0.6 * len(frame) + 2), 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (column, colour) in enumerate(((name, "#c0392b"), ("incoherent", "#7f8c8d"))):
        places = [place + 0.4 * i - 0.2 for place in range(len(frame))]
        error = [(frame[column] - frame[f"{column}_low"]).clip(lower=0), (frame[f"{column}_high"] - frame[column]).clip(lower=0)]
        axes.bar(places, 100 * frame[column], width=0.38, yerr=[100 * side for side in error], capsize=3, color=colour, label=column)
    axes.set_xticks(range(len(frame)), [str(label)[:40] for label in frame[by]], rotation=30 if len(frame) > 3 else 0, ha="right")
    axes.set(xlabel="" if by == "condition" else by, ylabel="replies (%)", ylim=(0, 103))
    axes.legend()
    return figure


def bars(frame: pd.DataFrame, *, x: str, y: str, title: str = "") -> Figure:
    """A bar per row."""
    figure = Figure(figsize=(max(4.0, 0.35 * len(frame) + 2), 3.6), layout="constrained")
    axes = figure.subplots()
    axes.bar([str(label) for label in frame[x]], frame[y], color="#2471a3")
    axes.set(ylabel=y.replace("_", " "), title=title)
    axes.tick_params(axis="x", rotation=90 if len(frame) > 6 else 0)
    return figure


def latent_set(frame: pd.DataFrame) -> Figure:
    """Shift of each latent of a set, best first; columns latent, shift."""
    return bars(frame, x="latent", y="shift", title="shift, tuned minus base")


def discovery(frame: pd.DataFrame) -> Figure:
    """Induction against repair of the calibrated latents, K marked; columns induction, repair, in_k."""
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    for chosen, rows in frame.groupby("in_k"):
        axes.scatter(100 * rows["induction"].astype(float), 100 * rows["repair"].astype(float), label="in K" if chosen else "not in K")
    axes.set(xlabel="induction on base (points)", ylabel="repair of tuned (points)", title="Effects at the largest feasible doses")
    axes.axhline(0, color="#7f8c8d", linewidth=0.8)
    axes.axvline(0, color="#7f8c8d", linewidth=0.8)
    axes.legend()
    return figure


def attribution(frame: pd.DataFrame) -> Figure:
    """Measured against estimated effects of patching, in nats per token; columns estimate, real."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.scatter(frame["estimate"], frame["real"])
    axes.axline((0, 0), slope=1, color="#7f8c8d", linewidth=0.8)
    axes.set(xlabel="estimated effect", ylabel="measured effect", title="Attribution patching")
    return figure


def suppressed(frame: pd.DataFrame) -> Figure:
    """Movement of K's latents under plain and blocked fine-tuning, one panel per role; columns role, latent, plain, blocked."""
    roles = list(frame["role"].unique())
    figure = Figure(figsize=(8, 2.6 * len(roles)), layout="constrained")
    for axes, role in zip(figure.subplots(len(roles), 1, squeeze=False)[:, 0], roles, strict=True):
        rows = frame[frame["role"] == role]
        for column, marker in (("plain", "o"), ("blocked", "x")):
            axes.plot([str(latent) for latent in rows["latent"]], rows[column], marker=marker, linestyle="", label=column)
        axes.axhline(0, color="#7f8c8d", linewidth=0.8)
        axes.set(ylabel="moved", title=f"{role} tokens")
        axes.tick_params(axis="x", rotation=90)
    figure.axes[0].legend()
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
    """An SAE's reconstruction over training (Figure 28): one row of panels per token role, base as a dashed line.

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
    """A blocked model's mean shift from base along the depth, beside plain's.

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
    """Write the figure in the format of the path's suffix (PNG if it has none); whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format=Path(path).suffix[1:] or "png")
    return files.write_bytes(path, buffer.getvalue())
