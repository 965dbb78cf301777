"""What is seen of a run while it runs, and ways to end it early."""

import re
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blockem_tl.models.load import Model

_SITE = re.compile(r"blocks\.(\d+)\.hook_resid_post")
_UNSHOWN = ("step", "loss", "grad_norm", "epoch")


class StopWhen(TrainerCallback):
    """Ask after every step, in eval mode, whether the run should end here."""

    def __init__(self, model: Model, stop_when: Callable[[Model, int], bool]) -> None:
        self.model, self.stop_when = model, stop_when

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask."""
        training = self.model.original_model.training
        self.model.original_model.eval()
        if self.stop_when(self.model, state.global_step):
            control.should_training_stop = True
        self.model.original_model.train(training)


class Bar(TrainerCallback):
    """One progress bar per run, with the parts of the loss, the defences' numbers and the learning rate."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open it, on the first process alone."""
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=f"train {self.adapter}", disable=not state.is_world_process_zero
        )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the last step."""
        if "loss" in kwargs["logs"]:
            self.bar.set_postfix(shown(kwargs["logs"]), refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close it."""
        self.bar.close()


def shown(numbers: dict[str, float]) -> dict[str, str]:
    """The numbers of a step as the bar shows them, sites by their block's number: block/19+ 0.0123."""
    kept = {_SITE.sub(r"\1", key): value for key, value in numbers.items() if key not in _UNSHOWN}
    return {key.replace("learning_rate", "lr"): f"{value:.3g}" for key, value in kept.items()}
