"""Figures from data frames. No torch here, and no figure without intervals where there are rates."""

import io
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockem_tl import records

_CURVES = {
    "em": ("emergent misalignment", "#c0392b"),
    "adherence": ("in-domain adherence", "#2471a3"),
    "incoherence": ("incoherence", "#7f8c8d"),
}
_MARKS = {"sft": "o", "matched": "s", "random": "D", "kl": "^", "block": "*", "block-all": "P", "top-delta": "X"}


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


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG; whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return records.write_bytes(path, buffer.getvalue())
