"""Hyperparameters of a fine-tune, and what transformers' Trainer is told of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import TrainingArguments

from blockem_tl.models.load import Model
from blockem_tl.models.lora import LLAMA_PROJECTIONS


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Hyperparameters of one fine-tune; the defaults are the paper's (B.4).

    batch_size: examples per optimizer step, all processes together.  micro_batch_size: examples per forward of one process (None: all at
    once); it does not change the result.  up_to_block: last block with LoRA (None: all).  bf16: compute under autocast (a model loaded in
    bfloat16 needs it not).  gradient_checkpointing: keep one activation per block and compute the rest again in the backward.
    """

    rank: int = 16
    alpha: int = 32
    target_modules: tuple[str, ...] = LLAMA_PROJECTIONS
    up_to_block: int | None = None
    dropout: float = 0.0
    epochs: float = 1.0
    learning_rate: float = 7.5e-5
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup_steps: int = 0
    batch_size: int = 64
    micro_batch_size: int | None = None
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.epochs < float("inf") and 0 < self.learning_rate < float("inf") and self.batch_size >= 1):
            raise ValueError("training: expected epochs > 0, learning_rate > 0 and batch_size >= 1")
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"training: batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}")


class _Arguments(TrainingArguments):
    place_model_on_device = property(lambda self: False)  # the model stays where load_model put it


def trainer_arguments(config: TrainingConfig, model: Model, folder: str, report_to: Sequence[str], run_name: str) -> TrainingArguments:
    """The same fine-tune in the Trainer's words. Raises ValueError where the batch cannot be shared out among the processes."""
    arguments = _Arguments(
        output_dir=folder,
        run_name=run_name,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        weight_decay=0.0,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # the reentrant kind would cut the penalty's gradient
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=list(report_to),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,  # its bar prints a line per logged step; ours does not
        log_level="error",
        use_cpu=model.device.type == "cpu",
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # never DataParallel, which hooks and adapters do not survive
    each, left = divmod(config.batch_size, arguments.world_size)
    micro = min(config.micro_batch_size or each, each)
    if left or each % micro:
        raise ValueError(
            f"training: batch_size {config.batch_size} on {arguments.world_size} processes is {config.batch_size / arguments.world_size:g} "
            f"examples each, which must be a whole multiple of micro_batch_size {micro}"
        )
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = micro, each // micro
    return arguments
