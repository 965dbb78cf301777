"""Hyperparameters of a fine-tune."""

import math
from dataclasses import dataclass
from typing import Literal

from blockem_tl.models.lora import LLAMA_PROJECTIONS


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Hyperparameters of one fine-tune; the defaults are the paper's (B.4).

    up_to_block: last block with LoRA (None: all).  warmup_steps: of the linear and the cosine schedule.  batch_size: examples per
    optimizer step, all processes together.  max_grad_norm: 0 for no clipping.  bf16: compute under autocast; in a model loaded in bfloat16
    that is LoRA alone, which otherwise keeps float32 copies of its inputs.

    How a step is computed does not change the result.  micro_batch_size: examples per forward of one process (None: all at once, or what
    fits into the free memory).  gradient_checkpointing: keep one activation per block and compute the rest again in the backward (None:
    where the micro-batch would not fit otherwise).

    Raises:
        ValueError: a number that is none, or out of its range; a batch that micro-batches do not fill.
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
    gradient_checkpointing: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size", "warmup_steps", "seed"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise ValueError(f"training: expected a whole number as {name}, got {getattr(self, name)!r}")
        if not (0 < self.epochs < float("inf") and 0 < self.learning_rate < float("inf") and self.batch_size >= 1):
            raise ValueError("training: expected epochs > 0, learning_rate > 0 and batch_size >= 1")
        if not (0 <= self.max_grad_norm < float("inf") and 0 <= self.dropout < 1 and self.warmup_steps >= 0):
            raise ValueError("training: expected max_grad_norm >= 0, 0 <= dropout < 1 and warmup_steps >= 0")
        if self.rank < 1 or not abs(self.alpha) < float("inf") or self.alpha == 0 or (self.micro_batch_size or 1) < 1:
            raise ValueError("training: expected rank >= 1, an alpha other than 0 and micro_batch_size >= 1")
        if self.schedule not in ("linear", "constant", "cosine"):
            raise ValueError(f"training: expected a schedule 'linear', 'constant' or 'cosine', got {self.schedule!r}")
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"training: batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}")

    def micro_batch(self, processes: int) -> int:
        """Examples per forward of each process. Raises ValueError if the batch cannot be shared out among them."""
        each, left = divmod(self.batch_size, processes)
        micro = min(self.micro_batch_size or each, each)
        if left or each % micro:
            raise ValueError(
                f"training: batch_size {self.batch_size} on {processes} processes is {self.batch_size / processes:g} examples each, which "
                f"must be a whole multiple of micro_batch_size {micro}"
            )
        return micro

    def learning_rate_at(self, step: int, last_step: int) -> float:
        """Learning rate of the update after ``step`` updates, in a run of ``last_step``."""
        if self.schedule == "constant":
            return self.learning_rate
        if step < self.warmup_steps:
            return self.learning_rate * (step / max(1, self.warmup_steps))
        length = max(1, last_step - self.warmup_steps)
        if self.schedule == "linear":
            return self.learning_rate * max(0.0, (last_step - step) / length)
        return self.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - self.warmup_steps) / length))))
