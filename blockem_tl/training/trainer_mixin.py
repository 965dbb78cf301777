"""Defences in any of transformers' Trainers: a mixin that adds their penalties to the Trainer's own loss, and their numbers to its log."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from blockem_tl.data.chat import Batch, Encoded
from blockem_tl.models.load import Model
from blockem_tl.training.defence import Adapts, Defence, FinishesAdapter, Measures, Prepares, RewritesRows, weight_of


def defend(trainer: Trainer, model: Model, defences: Sequence[Defence]) -> None:
    """Add defences to a Trainer of your own, before ``train()``::

        model = load_model(peft_model, tokenizer=tokenizer)  # the hooks go into the live modules
        defend(trainer, model, [Blocking(latent_set=latents, sae=sae, weight=1e4)])

    The Trainer's loss, data, accumulation and processes stay what they are. Supervised tokens are those with a label (not -100).
    Checkpoints keep peft's plain names, and ``resume_from_checkpoint`` reads them.

    Args:
        model: around the very model that the trainer trains; its adapters are in place.

    Raises:
        ValueError: another model than the trainer's, a defence that does not fit it, rewrites rows (call its ``rewrite`` before you
            tokenise) or would have no gradient, or two of one name.
    """
    if trainer.model is not model.hf:
        raise ValueError(
            "defend: expected load_model(...) of the model that the trainer trains; load that one, or give the trainer model.hf"
        )
    check_defences(model, defences)
    rewriting = [defence.name for defence in defences if isinstance(defence, RewritesRows)]
    if rewriting:
        raise ValueError(f"defend: {rewriting} rewrite rows, which are tokens by now: call rewrite(examples, seed=...) before you tokenise")
    trainer.__class__ = type(f"Defended{type(trainer).__name__}", (Defended, type(trainer)), {})
    cast(Defended, trainer).start_defending(model, defences)


def check_defences(model: Model, defences: Sequence[Defence]) -> None:
    """Raise ValueError unless every defence can act on ``model``, under a name of its own."""
    model.check_unspliced()
    names = [defence.name for defence in defences]
    if len({*names, "sft"}) <= len(names):
        raise ValueError(f"defences: expected different names, none of them 'sft' (the log goes by name), got {names}")
    for defence in defences:
        defence.check(model)


class Defended(Trainer):
    """What `defend` makes of a Trainer; as a mixin it stands before the Trainer's class."""

    lens: Model
    defences: Sequence[Defence] = ()

    def start_defending(self, model: Model, defences: Sequence[Defence]) -> None:
        """Prepare the defences (checked already) on the rows to come."""
        self.lens, self.defences = model, defences
        self._stack: ExitStack = ExitStack()
        self._parts: dict[str, Tensor | float] = {}
        self._numbers: list[dict[str, float]] = []
        self._examples = 1
        self.add_callback(_AfterSteps(self))
        with self.accelerator.autocast():
            for defence in defences:
                if isinstance(defence, Prepares):
                    defence.prepare(model, self.encoded_rows())

    # -------------------------------------------------------------------------------------------- what the rows are

    def batch_of(self, inputs: Mapping[str, Any]) -> Batch:
        """The collated inputs as the library's batch; supervised tokens are those with a label."""
        ids = inputs["input_ids"]
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids, dtype=torch.bool)
        return Batch(ids=ids, mask=mask, system=torch.zeros_like(mask), reply=(inputs["labels"] != -100) & mask)

    def encoded_rows(self) -> list[Encoded]:
        """The rows' tokens, for defences that prepare; none for a dataset that can only be streamed."""
        rows: Any = self.train_dataset
        if not hasattr(rows, "__getitem__"):
            return []
        return [_encoded(rows[i]) for i in range(len(rows))]

    def name_rows(self, batch: Batch) -> str:
        """Which rows of the training data a batch holds, for error messages."""
        held = {tuple(ids[mask].tolist()) for ids, mask in zip(batch.ids, batch.mask, strict=True)}
        return str([i for i, row in enumerate(self.encoded_rows()) if row.ids in held])

    # -------------------------------------------------------------------------------------------- one step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Count the examples of all micro-batches and processes of the coming optimizer step."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._examples = self.summed(sum(len(next(iter(sample.values()))) for sample in samples))
        return samples, items

    def summed(self, count: int) -> int:
        """The sum over all processes."""
        if self.accelerator.num_processes == 1:
            return count
        return int(cast(Tensor, self.accelerator.reduce(torch.tensor(float(count), dtype=torch.float64, device=self.args.device), "sum")))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch. Defences watch until its backward is done, where gradient checkpointing runs their hooks again."""
        with ExitStack() as self._stack:
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's part of the step's loss: the Trainer's own, and the penalties over the examples of the whole step."""
        if not model.training:  # an evaluation of the Trainer's: plain SFT loss
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        batch = self.batch_of(inputs)
        with self.accelerator.autocast():
            watched = [(defence, self._stack.enter_context(defence.watch(self.lens, batch))) for defence in self.defences]
            sft, outputs = cast(Any, super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch))
            parts = {defence.name: fn(outputs.logits).sum() / self._examples for defence, fn in watched if fn is not None}
        weighted = sum(weight_of(defence) * parts[defence.name] for defence in self.defences if defence.name in parts)
        to_come = self._still_divided_by(num_items_in_batch)
        loss = sft + (to_come * self.accelerator.num_processes) * weighted  # gradients are averaged over the processes
        parts["sft"] = sft / to_come / self.accelerator.num_processes
        if not torch.isfinite(loss):
            self.stop_for(f"the loss became {float(loss.detach())}", parts, batch)
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach()
        return (loss, outputs) if return_outputs else loss

    def _still_divided_by(self, num_items: Any) -> int:
        """What `training_step` divides our loss by: the accumulation steps, unless the loss counts the whole step's tokens already."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    def stop_for(self, what: str, parts: Mapping[str, Any], batch: Batch) -> None:
        """Raise FloatingPointError with the step, the parts of the loss and the rows."""
        listed = ", ".join(f"{name} {float(torch.as_tensor(value).detach()):.4g}" for name, value in parts.items())
        raise FloatingPointError(
            f"{what} at step {self.state.global_step + 1} ({listed}), rows {self.name_rows(batch)}: lower the learning rate or the weights"
        )

    # -------------------------------------------------------------------------------------------- after steps

    def after_step(self) -> None:
        """Collect the step's numbers from all processes, and let the defences adapt to them."""
        world = self.accelerator.num_processes
        measured = [defence.metrics() for defence in self.defences if isinstance(defence, Measures)]
        numbers = {name: float(value) * world for name, value in self._parts.items()}  # parts add up over processes, measures average
        numbers |= {name: float(value) for one in measured for name, value in one.items()}
        if world > 1:
            sums = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.args.device)
            numbers = dict(zip(numbers, cast(Tensor, self.accelerator.reduce(sums, "mean")).tolist(), strict=True))
        self._parts = {}
        for defence in self.defences:
            if isinstance(defence, Adapts):
                defence.adapt(numbers)
        self._numbers.append(numbers)

    def log(self, logs, start_time=None):
        """Log the parts of the loss beside it, as means over the steps since the last time."""
        if "loss" in logs and self._numbers:
            names = list(dict.fromkeys(name for numbers in self._numbers for name in numbers))
            logs.update({name: sum(numbers.get(name, 0.0) for numbers in self._numbers) / len(self._numbers) for name in names})
            self._numbers = []
        super().log(logs, start_time)

    def finish_defences(self) -> None:
        """After the last step: defences that act on the trained adapter."""
        self.lens.original_model.eval()
        with torch.no_grad():
            for defence in self.defences:
                if isinstance(defence, FinishesAdapter):
                    defence.finish(self.lens, cast(str, self.lens.active_adapter))

    # -------------------------------------------------------------------------------------------- checkpoints

    def _save(self, output_dir=None, state_dict=None):
        """The Trainer's checkpoint, with the adapters under peft's plain names instead of the bridge's."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            for name, folder in self._adapter_folders(output_dir or cast(str, self.args.output_dir)):
                self.lens.write_adapter(folder, name)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Undo that on resuming."""
        for name, folder in self._adapter_folders(resume_from_checkpoint):
            self.lens.restore_adapter(folder, name)

    def _load_best_model(self):
        self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))

    def _adapter_folders(self, checkpoint: str) -> list[tuple[str, Path]]:
        """peft keeps the adapter "default" in the folder itself and every other one in a folder of its name."""
        return [(name, Path(checkpoint) / ("" if name == "default" else name)) for name in self.lens.adapters]


def _encoded(row: Mapping[str, Any]) -> Encoded:
    """A row with labels as ours: the completion begins at the first label."""
    supervised = [i for i, label in enumerate(row["labels"]) if int(label) != -100] if "labels" in row else []
    return Encoded(ids=tuple(int(token) for token in row["input_ids"]), n_system=0, n_prompt=supervised[0] if supervised else 0)


class _AfterSteps(TrainerCallback):
    def __init__(self, trainer: Defended) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Collect what the step did."""
        self.trainer.after_step()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Let defences finish the adapter."""
        self.trainer.finish_defences()
