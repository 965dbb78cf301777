"""`finetune`: from rows to a LoRA adapter, with defences, checkpoints and a log."""

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from blockem_tl.data.chat import Batch, Encoded, check_lengths, encode_examples, pad
from blockem_tl.models.load import Model
from blockem_tl.training.checkpoints import Checkpoints, SaveEvery, load_run, restore_generators, restore_optimizer
from blockem_tl.training.config import TrainingConfig, trainer_arguments
from blockem_tl.training.defence import Adapts, Defence, Records, RewritesRows
from blockem_tl.training.identity import identity_of
from blockem_tl.training.loss import summed_cross_entropy
from blockem_tl.training.progress import Bar, StopWhen
from blockem_tl.training.trainer_mixin import Defended, check_defences
from blockem_tl.types import Example

PAPER = TrainingConfig()


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What a fine-tune did: its adapter's name, optimizer steps, and one row per step (loss, sft, one entry per defence, ...).

    weights: per defence that says so, its final weight and what it is relative to (the SAE's norms).
    """

    adapter: str
    steps: int
    history: list[dict[str, float]] = field(repr=False)
    weights: dict[str, list[dict[str, Any]]] = field(repr=False, default_factory=dict)


def finetune(
    model: Model,
    examples: Sequence[Example],
    *,
    config: TrainingConfig = PAPER,
    defences: Sequence[Defence] = (),
    adapter: str = "default",
    start: str | Path | None = None,
    checkpoints: str | Path | None = None,
    save_every_epochs: float = 0.5,
    resume: bool = False,
    stop_when: Callable[[Model, int], bool] | None = None,
    report_to: Sequence[str] = (),
    progress: bool = True,
) -> TrainingRun:
    """Train a LoRA adapter called ``adapter`` on the completion tokens of ``examples``; it ends up active.

    Under ``torchrun`` every process calls this with the same arguments, and ``config.batch_size`` is that of all processes together.

    Args:
        defences: each adds weight * (mean over examples of its penalty), or what else it does.
        start: go on from this adapter, held by the model (it stays as it is) or in a folder; its rank, targets and blocks are kept.
            None: a fresh one.
        checkpoints: folder for ``epoch-0.5/``, ``epoch-1/``, ...: plain peft adapters every ``save_every_epochs`` and at the end.
        resume: go on from the last checkpoint there, to the same result as without the interruption; from the start if there is none.
        stop_when: asked after every optimizer step with (model, step); True ends the run there.
        report_to: "tensorboard", "wandb", ...: where transformers' Trainer also sends every step.

    Raises:
        ValueError: a row without prompt or completion, a row longer than the context, a defence that does not fit the model, a name
            already held, checkpoints of another run (naming what differs).
        FileExistsError: checkpoints are there already and ``resume`` is False.
        FloatingPointError: a loss or gradient that is NaN or infinite, naming the step, the rows and the last good checkpoint.
    """
    check_defences(model, defences)
    for defence in defences:
        if isinstance(defence, RewritesRows):
            examples = defence.rewrite(examples, seed=config.seed)
    encoded = encode_examples(model.tokenizer, examples)
    check_lengths(encoded, model.cfg.n_ctx)
    kept = Checkpoints(checkpoints, save_every_epochs) if checkpoints is not None else None
    _add_adapter(model, adapter, config, start)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():  # the Trainer seeds the global generator
            identity = identity_of(model, adapter, encoded, config, defences) if kept else {}
            last = kept.to_resume(identity, resume=resume) if kept else None
            arguments = trainer_arguments(config, model, folder, report_to, adapter)
            trainer = FineTuner(model, adapter, examples, encoded, arguments, kept, identity)
            trainer.watch_with(stop_when, progress)
            with _left_clean(model, trainer):
                trainer.start_defending(model, defences)
                trainer.run(last)
    except BaseException:
        model.remove_adapter(adapter)  # a half-trained adapter is worse than none
        raise
    for parameter in model.adapter_parameters(adapter):
        parameter.requires_grad_(False)
    weights = {defence.name: defence.record() for defence in defences if isinstance(defence, Records)}
    return TrainingRun(adapter=adapter, steps=trainer.state.global_step, history=trainer.history, weights=weights)


def _add_adapter(model: Model, adapter: str, config: TrainingConfig, start: str | Path | None) -> None:
    if start is None:
        model.add_adapter(
            adapter,
            rank=config.rank,
            alpha=config.alpha,
            target_modules=config.target_modules,
            up_to_block=config.up_to_block,
            dropout=config.dropout,
            seed=config.seed,
        )
    elif isinstance(start, str) and start in model.adapters:
        with tempfile.TemporaryDirectory() as folder:
            model.load_adapter(model.save_adapter(Path(folder) / "start", start), adapter)
    else:
        model.load_adapter(start, adapter)
    for parameter in model.adapter_parameters(adapter):
        parameter.requires_grad_(True)


@contextmanager
def _left_clean(model: Model, trainer: "FineTuner"):
    """Whatever happens, the model is left as it was: in eval mode, without what mixed precision and gradient checkpointing put into it."""
    try:
        yield
    finally:
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        if trainer.args.gradient_checkpointing:
            hf = cast(Any, model.original_model)
            hf.gradient_checkpointing_disable()
            hf.disable_input_require_grads()
        model.original_model.eval()


class _CompletionTrainer(Trainer):
    """transformers' Trainer with the SFT loss as its loss, divided by the tokens of the whole step."""

    loss_is_scaled_for_ga = True  # we divide by the whole step's counts ourselves, so 1 x 8 accumulated equals 8 x 1
    tokens = 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy of this micro-batch's completion tokens over the step's; times the processes, whose gradients are averaged."""
        batch = cast("FineTuner", self).batch_of(inputs)
        outputs = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
        loss = summed_cross_entropy(outputs.logits, batch) / self.tokens * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class FineTuner(Defended, _CompletionTrainer):
    """The Trainer under `finetune`."""

    def __init__(
        self,
        model: Model,
        adapter: str,
        examples: Sequence[Example],
        encoded: Sequence[Encoded],
        arguments: TrainingArguments,
        checkpoints: Checkpoints | None,
        identity: dict[str, str],
    ) -> None:
        self.lens, self.adapter, self.examples, self.encoded = model, adapter, examples, encoded
        self.checkpoints, self.identity = checkpoints, identity
        self.history: list[dict[str, float]] = []
        super().__init__(
            model=cast(Any, model.hf),
            args=arguments,
            train_dataset=cast(Any, list(encoded)),
            data_collator=lambda rows: _tensors(pad(rows, model.pad_id, side="right")),
        )
        self.remove_callback(PrinterCallback)

    def watch_with(self, stop_when: Callable[[Model, int], bool] | None, progress: bool) -> None:
        """Add what looks at the run."""
        if stop_when:
            self.add_callback(StopWhen(self.lens, stop_when))
        if self.checkpoints:
            self.add_callback(SaveEvery(self.checkpoints.every_epochs))
        if progress:
            self.add_callback(Bar(self.adapter))

    def run(self, last: Path | None) -> None:
        """Train, from the beginning or from a checkpoint; a finished one is only loaded."""
        if last is not None:
            run = load_run(last)
            self.history.extend(run["history"])
            for defence in self.defences:
                if isinstance(defence, Adapts):
                    defence.restore(run["defences"][defence.name])
            if run["finished"]:
                self._load_from_checkpoint(last)
                self.state.global_step = run["step"]
                return
        self.train(resume_from_checkpoint=None if last is None else str(last))

    # -------------------------------------------------------------------------------------------- rows

    def batch_of(self, inputs):
        """The collated tensors are a batch's fields."""
        return Batch(**{name: tensor.to(self.lens.device) for name, tensor in inputs.items()})

    def encoded_rows(self) -> list[Encoded]:
        """The rows' tokens."""
        return list(self.encoded)

    def name_rows(self, batch: Batch) -> str:
        """The examples' ids."""
        held = {tuple(ids[mask].tolist()) for ids, mask in zip(batch.ids, batch.mask, strict=True)}
        return str([example.id for example, row in zip(self.examples, self.encoded, strict=True) if row.ids in held])

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Count the completion tokens of the coming optimizer step too."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.tokens = self.summed(sum(int(sample["reply"][:, 1:].sum()) for sample in samples))
        self._rows = samples
        return samples, self.tokens

    # -------------------------------------------------------------------------------------------- log and end

    def log(self, logs, start_time=None):
        """Keep every logged step as a row of ``history``, with the parts of the loss."""
        super().log(logs, start_time)
        if "loss" in logs:
            self.history.append({"step": float(self.state.global_step), **{k: float(v) for k, v in logs.items()}})

    def stop_for(self, what, parts, batch) -> None:
        """Add which checkpoint is good."""
        good = self.checkpoints.all() if self.checkpoints else []
        try:
            super().stop_for(what, parts, batch)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. The last good checkpoint is {good[-1]}" if good else str(error)) from None

    def _get_grad_norm(self, model, grad_norm=None):
        norm = float(cast(Any, super()._get_grad_norm(model, grad_norm)))
        if not math.isfinite(norm):  # the step would leave an adapter of NaN, and a checkpoint of it
            rows = [self.batch_of(sample) for sample in self._rows]
            self.stop_for(f"the gradient became {norm}", self._parts, rows[0])
        return norm

    # -------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model, trial):
        cast(Checkpoints, self.checkpoints).save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.lens.restore_adapter(resume_from_checkpoint, self.adapter)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            restore_optimizer(self, checkpoint)

    def _load_rng_state(self, checkpoint):
        if checkpoint is not None:
            restore_generators(checkpoint, self.args.process_index)


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {"ids": batch.ids, "mask": batch.mask, "system": batch.system, "reply": batch.reply}
