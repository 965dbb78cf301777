"""Figures of studies: rates along a strength, a size or the training, and runs side by side. Frames of `study.summary`, as fractions."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import pandas as pd
from matplotlib.axes import Axes

from blockem_tl.views.figures import Figure

COLOURS = {"misaligned": "#c0392b", "incoherent": "#7f8c8d", "refusal": "#b9770e", "adherent": "#2471a3"}
RATES = ("misaligned", "incoherent", "adherent")


def along(frame: pd.DataFrame, x: str, *, panels: str | None = None, columns: Sequence[str] = RATES) -> Figure:
    """Rates with their intervals along ``x``, whose values are evenly spaced, a panel for each value of ``panels``, and the loss.

    frame: columns x, panels, every one of ``columns`` with _low and _high, and test_loss.
    """
    parts: list[tuple[str, Any]] = (
        [("", frame)] if panels is None else [(str(name), part) for name, part in frame.groupby(panels, sort=False)]
    )
    figure = Figure(figsize=(4.4 * (len(parts) + 1), 3.9), layout="constrained")
    *axes, last = figure.subplots(1, len(parts) + 1, squeeze=False)[0]
    for (name, rows), one in zip(parts, axes, strict=True):
        _rates(one, rows.sort_values(x), x, columns)
        one.set_title(name)
        _against(last, rows.sort_values(x), x, name)
    axes[0].legend(fontsize=8)
    last.set(xlabel=x, ylabel="held-out SFT loss (nats per token)")
    if len(parts) > 1:
        last.legend(fontsize=8)
    return figure


def _rates(axes: Axes, rows: Any, x: str, columns: Sequence[str]) -> None:
    places = range(len(rows))
    for column in columns:
        axes.errorbar(
            places, 100 * rows[column], yerr=_errors(rows, column), label=column, color=COLOURS.get(column), marker="o", capsize=3
        )
    axes.set_xticks(list(places), [f"{value:g}" for value in rows[x]])
    axes.set(xlabel=x, ylabel="replies (%)", ylim=(-3, 103))


def _against(axes: Axes, rows: Any, x: str, label: str) -> None:
    axes.plot(range(len(rows)), rows["test_loss"], marker="o", label=label)
    axes.set_xticks(range(len(rows)), [f"{value:g}" for value in rows[x]])


def _errors(rows: Any, column: str, unit: float = 100) -> list[Any]:
    ends = (rows[column] - rows[f"{column}_low"], rows[f"{column}_high"] - rows[column])
    return [unit * end.clip(lower=0).fillna(0) for end in ends]


def shifts_along(frame: pd.DataFrame, x: str, *, y: Literal["removed", "effect"] = "removed", panels: str | None = None) -> Figure:
    """The share of the shift that is gone along ``x``, or the effect in nats; a line with its interval per run, a panel per value of
    ``panels``.

    frame: columns run, x, panels, and y with _low and _high.
    """
    unit, label = (100, "of the margin's shift gone (%)") if y == "removed" else (1, "change of the margin (nats per token)")
    parts: list[tuple[str, Any]] = (
        [("", frame)] if panels is None else [(str(name), part) for name, part in frame.groupby(panels, sort=False)]
    )
    figure = Figure(figsize=(4.6 * len(parts) + 0.8, 3.9), layout="constrained")
    for (name, rows), axes in zip(parts, figure.subplots(1, len(parts), squeeze=False, sharey=True)[0], strict=True):
        for run, line in rows.dropna(subset=[y]).groupby("run", sort=False):
            line = line.sort_values(x)
            axes.errorbar(line[x], unit * line[y], yerr=_errors(line, y, unit), label=str(run), marker="o", markersize=3, capsize=2)
        axes.axhline(0, color="#7f8c8d", linewidth=0.8)
        axes.set(xlabel=x, ylabel=label, title=name)
        axes.legend(fontsize=7)
    return figure


def over_epochs(frame: pd.DataFrame, **losses: str) -> Figure:
    """EM of each run over the epochs with its interval, and beside it a panel per loss, on a logarithmic scale.

    frame: columns run, epoch, misaligned with _low and _high, and those of ``losses``, whose values are the axes' labels.
    """
    figure = Figure(figsize=(5.5 * (1 + len(losses)), 4.8), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(losses), squeeze=False)[0]
    for i, (name, rows) in enumerate(frame.sort_values("epoch").groupby("run", sort=False)):
        look: Any = {"color": f"C{i % 10}", "marker": "o*^sDPXvp<>"[i % 11], "markersize": 4}
        first.errorbar(rows["epoch"], 100 * rows["misaligned"], yerr=_errors(rows, "misaligned"), label=str(name), capsize=2, **look)
        for axes, column in zip(others, losses, strict=True):
            axes.plot(rows["epoch"], rows[column], **look)
    first.set(xlabel="epoch", ylabel="misaligned replies (%)", ylim=(-3, 103))
    for axes, label in zip(others, losses.values(), strict=True):
        axes.set(xlabel="epoch", ylabel=label, yscale="log")
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def against(frame: pd.DataFrame, *, x: str, y: str, label: str) -> Figure:
    """One share over another with its interval, beside the line of equality: columns ``x``, ``y`` with its ends, ``label``."""
    figure = Figure(figsize=(5.2, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, rows in frame.groupby(label, sort=False):
        axes.errorbar(100 * rows[x], 100 * rows[y], yerr=_errors(rows, y), label=str(name), marker="o", linestyle="", capsize=3)
    ends = [100 * frame[x].min(), 100 * frame[x].max()]
    axes.plot(ends, ends, color="#7f8c8d", linewidth=0.8)
    axes.set(xlabel=f"{x} (%)", ylabel=f"{y} (%)")
    axes.legend(title=label, fontsize=8)
    return figure


def tradeoff(frame: pd.DataFrame, y: str) -> Figure:
    """The rate ``y`` with its interval over the held-out loss, a point per run: columns run, test_loss, y with its ends."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, rows) in enumerate(frame.dropna(subset=["test_loss", y]).groupby("run", sort=False)):
        look: Any = {"marker": "o*^sDPXvp<>"[i // 10 % 11], "color": f"C{i % 10}"}
        axes.errorbar(rows["test_loss"], 100 * rows[y], yerr=_errors(rows, y), label=str(name)[:60], linestyle="", capsize=3, **look)
    axes.set(xlabel="held-out SFT loss (nats per token)", ylabel=f"{y} (%)")
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def side_by_side(frame: pd.DataFrame, *, label: str = "run", columns: Sequence[str] = RATES) -> Figure:
    """A group of bars per row, a bar with its interval per column. Frame as for `along`, without the loss."""
    figure = Figure(figsize=(max(5.0, 0.9 * len(frame) + 2), 4.2), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(columns)
    for i, column in enumerate(columns):
        places = [place + (i - (len(columns) - 1) / 2) * width for place in range(len(frame))]
        axes.bar(places, 100 * frame[column], width, yerr=_errors(frame, column), capsize=2, color=COLOURS.get(column), label=column)
    axes.set_xticks(range(len(frame)), [str(text)[:40] for text in frame[label]], rotation=30, ha="right")
    axes.set(ylabel="replies (%)" if (frame[list(columns)].to_numpy() >= 0).all() else "points (%)")
    axes.axhline(0, color="#7f8c8d", linewidth=0.8)
    axes.legend(fontsize=8)
    return figure


def training(frame: pd.DataFrame, *, label: str = "run") -> Figure:
    """The smoothed SFT loss over the steps of each run, and its penalty: columns ``label``, step, smoothed, loss, sft; means over seeds."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs: Any = frame.assign(penalty=frame["loss"] - frame["sft"]).groupby(label, sort=False)
    for name, rows in runs:
        lines = rows.groupby("step")[["smoothed", "penalty"]].mean()
        left.plot(lines.index, lines["smoothed"], label=str(name))
        right.plot(lines.index, lines["penalty"], label=str(name))
    left.set(xlabel="step", ylabel="smoothed SFT loss (nats per token)", yscale="log")
    right.set(xlabel="step", ylabel="weighted penalty")
    left.legend(fontsize=7)
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
