"""What the free memory decides where a configuration leaves it open: rows per forward, and whether gradients are checkpointed."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import PartialState

from blockem_tl.data.chat import Encoded
from blockem_tl.models.load import Model
from blockem_tl.models.memory import free_bytes, training_row_bytes
from blockem_tl.training.config import TrainingConfig


def fitted(model: Model, rows: Sequence[Encoded], config: TrainingConfig) -> TrainingConfig:
    """The configuration with ``micro_batch_size`` and ``gradient_checkpointing`` decided.

    Neither changes what is computed. Checkpointing costs a third of the speed, so it is left off wherever the micro-batch fits without.

    Raises:
        ValueError: a batch that cannot be shared out among the processes.
    """
    on_cpu, longest = model.device.type == "cpu", max(len(row.ids) for row in rows)
    processes = PartialState(cpu=on_cpu).num_processes
    most = config.micro_batch(processes)
    share = free_bytes(model) // (processes if on_cpu else 1)  # processes share a processor's memory, and have a card each
    free = torch.tensor(share, device=model.device)
    if processes > 1:
        torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MIN)  # all run the same micro-batches
    fits = {on: int(free) // training_row_bytes(model, longest, checkpointing=on) for on in (False, True)}
    on = config.gradient_checkpointing
    if on is None:
        on = fits[False] < (most if config.micro_batch_size else 1)
    micro = most if config.micro_batch_size else max(n for n in range(1, most + 1) if most % n == 0 and n <= max(1, fits[on]))
    return replace(config, micro_batch_size=micro, gradient_checkpointing=on)
