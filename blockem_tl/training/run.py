"""`TrainingRun`, the result of a fine-tune, step by step; and a warning for one that hardly learnt."""

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from blockem_tl.views.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST_FALL = 0.05
_MOST_STEPS = 5  # rows that are shown


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainingRun(Result):
    """The result of a fine-tune: its adapter's name, optimizer steps, and one row per step (loss, sft, one entry per defence, ...).

    weights: per defence that describes its weight, one entry per target: "weight" at the end of the run, "peak", the largest in the run,
    and what they are relative to (the SAE's fingerprint and norms).
    """

    adapter: str
    steps: int
    history: list[dict[str, float]]
    weights: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One row per optimizer step."""
        frame = pd.DataFrame(self.history)
        return frame.astype({"step": int}) if len(frame) else frame

    def plot(self) -> "Figure":
        """Loss and SFT loss over the steps, and beside them the penalties."""
        from blockem_tl.views import plots  # matplotlib, which training does not need

        return plots.training(self.to_frame())

    def headline(self) -> str:
        """Adapter, number of steps, first and last SFT loss, the last step's weighted penalties, and each defence's weight."""
        parts = [f"adapter {self.adapter!r}", f"{self.steps} steps"]
        if self.history:
            first, last = self.history[0], self.history[-1]
            penalty = (
                f" (+ weighted penalty {last['loss'] - last['sft']:.4g})" if any(row["loss"] != row["sft"] for row in self.history) else ""
            )
            parts.append(f"SFT loss {first['sft']:.4g} -> {last['sft']:.4g}{penalty}")
        for name, targets in self.weights.items():
            parts += [f"{name} at {one['site']}: {_weight(one)}" for one in targets]
        return ", ".join(parts)

    def _shown(self) -> pd.DataFrame:
        """At most five steps, from the first to the last, without the penalties' parts (block/blocks.2.hook_resid_post+, ...)."""
        frame = self.to_frame()
        last = len(frame) - 1
        steps = sorted({round(last * i / (_MOST_STEPS - 1)) for i in range(_MOST_STEPS)}) if len(frame) else []
        return pd.DataFrame(frame.iloc[steps][[column for column in frame.columns if "/" not in str(column)]])


def _weight(target: dict[str, Any]) -> str:
    rising = "; λ still rising: the penalty never came down to its bound, train longer" if target.get("rising") else ""
    return f"weight λ {target['weight']:.4g}, at its peak {target['peak']:.4g}{rising}"


def warn_if_hardly_learnt(run: TrainingRun, stacklevel: int) -> None:
    """Warn if the mean SFT loss over the last tenth of the steps is less than 5 % below that over the first. Below 5 steps it is silent."""
    losses, n = [row["sft"] for row in run.history], max(1, run.steps // 10)
    first, last = sum(losses[:n]) / n, sum(losses[-n:]) / n
    if run.steps >= 5 and last > (1 - _LEAST_FALL) * first:
        warnings.warn(
            f"finetune: the SFT loss of adapter {run.adapter!r} hardly moved: {first:.4g} over the first tenth of {run.steps} steps, "
            f"{last:.4g} over the last. Raise the learning rate or the epochs, or lower the weights of the defences",
            stacklevel=stacklevel + 1,
        )
