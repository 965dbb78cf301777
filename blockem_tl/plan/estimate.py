"""`plan_memory`: what each stage of a preset takes on a GPU, and the largest batch that fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import torch

from blockem_tl.generation._scheduler import MOST_ROWS
from blockem_tl.models.load import Model
from blockem_tl.models.memory import row_bytes
from blockem_tl.plan import skeleton, stages
from blockem_tl.plan.meter import Meter
from blockem_tl.presets import Preset
from blockem_tl.training.config import TrainingConfig
from blockem_tl.training.loss import BATCH_SIZE

GB = 2**30
CONTEXT_GB = 1.0
"""What CUDA and its libraries hold themselves."""
SPARE = 0.05
"""Share of the card that is left to fragments."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage's need, in GB: what lies there all the time, and the peak of work beside it, at this batch; fits: on the card."""

    stage: str
    batch: int
    resident: float
    work: float
    fits: bool

    @property
    def total(self) -> float:
        """GB in all, with what CUDA holds."""
        return self.resident + self.work + CONTEXT_GB


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Every stage of a preset on a card of ``gpu_gb``, with rows of ``tokens``."""

    preset: str
    gpu_gb: float
    tokens: int
    stages: tuple[Stage, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per stage, in GB."""
        columns = ["stage", "batch", "resident_gb", "work_gb", "total_gb", "fits"]
        rows = [(s.stage, s.batch, s.resident, s.work, s.total, s.fits) for s in self.stages]
        return pd.DataFrame(rows, columns=columns).round(1)


def plan_memory(preset: Preset, *, gpu_gb: float = 80.0, tokens: int = 400, new_tokens: int | None = None) -> MemoryPlan:
    """What training, losses and generation of a preset take, by running their own code on tensors without data.

    The micro-batch is the preset's, halved until it fits; generation's batch is what fits. On the model's card
    lie the weights, the SAE in float32, and in training the adapter with AdamW's moments.

    Args:
        gpu_gb: the card's memory.  tokens: of a row, prompt and completion.  new_tokens: of a reply; the preset's by default.

    Raises:
        ValueError: numbers that are not positive, or a model whose configuration cannot be had.
    """
    if not (0 < gpu_gb < float("inf") and tokens >= 2):
        raise ValueError(f"plan: expected gpu_gb > 0 and at least 2 tokens, got {gpu_gb:g} and {tokens}")
    room = int(((1 - SPARE) * gpu_gb - CONTEXT_GB) * GB)
    config = skeleton.config_of(preset.model)
    with Meter() as meter:
        model = skeleton.skeleton(config, dtype=_DTYPES[preset.dtype], context=tokens)
        sae = stages.plain_sae(preset.site, model.cfg.d_model, skeleton.latents_of(preset, model.cfg.d_model))
        found = [_training(meter, model, sae, replace(preset.training, gradient_checkpointing=on), tokens, room) for on in (False, True)]
        found.append(_losses(meter, model, tokens, room))
        found.append(_replies(meter, model, tokens // 2 + (new_tokens or preset.max_new_tokens), room))
    return MemoryPlan(preset=preset.name, gpu_gb=gpu_gb, tokens=tokens, stages=tuple(found))


def _training(meter: Meter, model: Model, sae: object, config: TrainingConfig, tokens: int, room: int) -> Stage:
    with stages.trainable(model, config) as parameters:
        resident = meter.now + sum(3 * p.numel() * p.element_size() for p in parameters)  # two moments, and the gradient
        for parameter in parameters if config.bf16 else ():
            parameter.data = parameter.data.to(torch.bfloat16)  # what autocast computes with, which does not know this device

        def work(n: int) -> int:
            peak = stages.peak_of(
                meter, lambda: stages.training_step(model, stages.rows_of(n, tokens, model.device), sae, list(range(20)), live=True)
            )
            for parameter in parameters:
                parameter.grad = None
            return peak

        name = "training, gradient checkpointing" if config.gradient_checkpointing else "training"
        return _largest(name, work, resident, config.micro_batch_size or config.batch_size, room)


def _losses(meter: Meter, model: Model, tokens: int, room: int) -> Stage:
    def work(n: int) -> int:
        return stages.peak_of(meter, lambda: stages.losses(model, stages.rows_of(n, tokens, model.device)))

    return _largest("losses", work, meter.now, BATCH_SIZE, room)


def _replies(meter: Meter, model: Model, tokens: int, room: int) -> Stage:
    each = row_bytes(model, tokens)
    n = max(1, min((room - meter.now) // each, MOST_ROWS))
    return Stage(stage="replies", batch=n, resident=meter.now / GB, work=n * each / GB, fits=meter.now + n * each <= room)


def _largest(name: str, work: Callable[[int], int], resident: int, most: int, room: int) -> Stage:
    """The stage at the largest batch that fits: ``most``, or that halved again and again; at 1 if none does."""
    batch = most
    while True:
        needed = work(batch)
        if resident + needed <= room or batch == 1:
            return Stage(stage=name, batch=batch, resident=resident / GB, work=needed / GB, fits=resident + needed <= room)
        batch //= 2
