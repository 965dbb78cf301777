"""Defences in any of transformers' Trainers: a mixin that adds their penalties to the Trainer's own loss, and their numbers to its log."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from blockem_tl.data.chat import Batch, Encoded
from blockem_tl.models.load import Model
from blockem_tl.training.active import ActiveDefences, naming
from blockem_tl.training.defence import Defence, RewritesRows, check_defences

_PACKED = (
    "packed and padding-free rows are not supported, since base and penalties read each row by itself. Set packing=False and "
    "padding_free=False, or use a collator that pads"
)
_SEQUENCE_KEYS = {"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "seq_lengths"}


def defend(trainer: Trainer, model: Model, defences: Sequence[Defence]) -> None:
    """Add defences to a Trainer of your own, before ``train()``::

        model = load_model(peft_model, tokenizer=tokenizer)  # the hooks go into the live modules
        defend(trainer, model, [Blocking(latent_set=latent_set, sae=sae, weight=1e4)])

    The Trainer's loss, data, accumulation and processes stay what they are. Supervised tokens are those with a label (not -100).
    Checkpoints keep peft's plain names, and ``resume_from_checkpoint`` reads them.

    Args:
        model: around the very model that the trainer trains; its adapters are in place.

    Raises:
        TypeError: something that is no defence.
        ValueError: another model than the trainer's, packed rows (there, or at the first step), two defences of one name, or a defence
            that does not fit the model, would have no gradient, or rewrites rows (call its ``rewrite`` before you tokenise).
    """
    if trainer.model is not model.hf:
        raise ValueError(
            "defend: expected load_model(...) of the model that the trainer trains; load that one, or give the trainer model.hf"
        )
    check_defences(defences)
    joined = [name for name in ("packing", "padding_free") if getattr(trainer.args, name, False)]
    if joined:
        raise ValueError(f"defend: the trainer's {' and '.join(joined)} join several rows into one: {_PACKED}")
    active = ActiveDefences(model, defences)
    rewriting = [defence.name for defence in defences if isinstance(defence, RewritesRows)]
    if rewriting:
        raise ValueError(f"defend: {rewriting} rewrite rows, which are tokens by now: call rewrite(examples, seed=...) before you tokenise")
    trainer.__class__ = type(f"Defended{type(trainer).__name__}", (Defended, type(trainer)), {})
    cast(Defended, trainer).start_defending(active)


class Defended(Trainer):
    """The class that `defend` gives to a Trainer: a mixin before the Trainer's own."""

    active: ActiveDefences

    def start_defending(self, active: ActiveDefences) -> None:
        """Prepare the defences (checked already) on the rows to come."""
        self.active, self._contexts = active, ExitStack()
        self.numbers: list[dict[str, float]] = []  # of the steps since the last log
        self._examples = 1
        self.add_callback(_AfterSteps(self))
        with self.accelerator.autocast():
            active.prepare(self.encoded_rows())

    # -------------------------------------------------------------------------------------------- what the rows are

    def batch_of(self, inputs: Mapping[str, Any]) -> Batch:
        """The collated inputs as the library's batch; supervised tokens are those with a label."""
        try:
            batch = Batch.from_labels(inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"))
        except ValueError as error:
            raise ValueError(f"defend: {error}: {_PACKED}") from error
        places = inputs.get("position_ids")
        packed = places is not None and not torch.equal(places.expand_as(batch.ids)[batch.mask], batch.positions[batch.mask])
        if packed or _SEQUENCE_KEYS & set(inputs):
            raise ValueError(f"defend: the collator joins several rows into one, with positions that start again: {_PACKED}")
        return batch

    def encoded_rows(self) -> list[Encoded]:
        """The rows' tokens, for defences that prepare; none for a dataset that can only be streamed."""
        rows: Any = self.train_dataset
        return [_encoded(rows[i]) for i in range(len(rows))] if hasattr(rows, "__getitem__") else []

    def _where(self, batch: Batch) -> str:
        held = {tuple(ids[mask].tolist()) for ids, mask in zip(batch.ids, batch.mask, strict=True)}
        rows = [i for i, row in enumerate(self.encoded_rows()) if row.ids in held]
        return f"at step {self.state.global_step + 1} on rows {rows}"

    # -------------------------------------------------------------------------------------------- one step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Count the examples of all micro-batches and processes of the coming optimizer step."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(len(next(iter(sample.values()))) for sample in samples), device=self.args.device)
        self._examples = int(cast(Tensor, self.accelerator.reduce(count, "sum")))
        return samples, items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch. Defences stay attached until its backward is done: gradient checkpointing runs their hooks again there."""
        with ExitStack() as self._contexts:
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's part of the step's loss: the Trainer's own, and the penalties over the examples of the whole step."""
        if not model.training:  # an evaluation of the Trainer's: plain SFT loss
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        batch = self.batch_of(inputs)
        with self.accelerator.autocast():
            penalties = self._contexts.enter_context(self.active.during_step(batch))
            with _forwards(self.active.model) as forwards:  # not return_outputs: TRL runs the model again for it, without gradient
                sft = cast(Tensor, super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch))
            outputs = self._only(forwards)
            with naming(lambda: self._where(batch)):
                parts = penalties(getattr(outputs, "logits", None), self._examples)
        scale = self._still_divided_by(num_items_in_batch) * self.accelerator.num_processes  # gradients are averaged over the processes
        loss = self.active.loss(sft, parts, scale, lambda: self._where(batch))
        return (loss, outputs) if return_outputs else loss

    def _only(self, forwards: Sequence[Any]) -> Any:
        """What the micro-batch's one forward gave. Raises ValueError if there was not one: penalties belong to a single forward."""
        if len(forwards) != 1:
            raise ValueError(
                f"defend: expected the trainer's loss to run the model once on a micro-batch, it did {len(forwards)} times: a penalty "
                "could not tell which of them is trained. Leave out what runs it again (label smoothing, a loss function of your own)"
            )
        return forwards[0]

    def _still_divided_by(self, num_items: Any) -> int:
        """Divisor of our loss in `training_step`: the accumulation steps, unless the loss counts the whole step's tokens already."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    # -------------------------------------------------------------------------------------------- after steps

    def log(self, logs, start_time=None):
        """Log the parts of the loss beside it, as means over the steps since the last time."""
        if "loss" in logs and self.numbers:
            names = list(dict.fromkeys(name for numbers in self.numbers for name in numbers))
            logs.update({name: sum(numbers.get(name, 0.0) for numbers in self.numbers) / len(self.numbers) for name in names})
            self.numbers = []
        super().log(logs, start_time)

    # -------------------------------------------------------------------------------------------- checkpoints

    def save_model(self, output_dir=None, _internal_call=False):
        """Save as the Trainer does, with the adapters under peft's plain names instead of the bridge's."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            for name, folder in self._adapter_folders(output_dir or cast(str, self.args.output_dir)):
                self.active.model.write_adapter(folder, name)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):  # there is no public hook for either of these two
        for name, folder in self._adapter_folders(resume_from_checkpoint):
            self.active.model.restore_adapter(folder, name)

    def _load_best_model(self):
        self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))

    def _adapter_folders(self, checkpoint: str) -> list[tuple[str, Path]]:
        """Name and folder of each adapter: peft keeps "default" in the checkpoint itself and every other one in a folder of its name."""
        return [(name, Path(checkpoint) / ("" if name == "default" else name)) for name in self.active.model.adapters]


def _encoded(row: Mapping[str, Any]) -> Encoded:
    """A row with labels as ours: the completion begins at the first label."""
    supervised = [i for i, label in enumerate(row["labels"]) if int(label) != -100] if "labels" in row else []
    return Encoded(ids=tuple(int(token) for token in row["input_ids"]), n_system=0, n_prompt=supervised[0] if supervised else 0)


@contextmanager
def _forwards(model: Model) -> Iterator[list[Any]]:
    """What the model gives in each of its forwards meanwhile, those without gradient included."""
    seen: list[Any] = []
    handle = cast(torch.nn.Module, model.hf).register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


class _AfterSteps(TrainerCallback):
    def __init__(self, trainer: Defended) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Collect the step's numbers for the next log."""
        self.trainer.numbers.append(self.trainer.active.close_step())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Let defences finish the adapter."""
        self.trainer.active.finish(cast(str, self.trainer.active.model.active_adapter))
