"""A model that no card holds: each process of ``torchrun`` keeps a share of base, and a block is put together while it runs."""

from typing import cast

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from blockem_tl.models.load import Model


def shard(model: Model) -> None:
    """Share base's weights out over the processes of ``torchrun`` (PyTorch's FSDP2), block by block, each onto its own card.

    Load the model onto the CPU first. Hooks see whole activations as before, and adapters, which come afterwards, are whole in every
    process. A forward gathers weights from all processes: from now on all of them must make the same calls.

    Raises:
        ValueError: one process, or a model that holds adapters already.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    if processes.num_processes < 2:
        raise ValueError("shard: expected several processes, got one: start the script with torchrun --nproc-per-node=2")
    if model.adapters:
        raise ValueError(f"shard: expected a model without adapters, got {model.adapters}: add or load them afterwards")
    mesh = init_device_mesh(cast(torch.device, processes.device).type, (processes.num_processes,))
    for block in (*model.blocks, model.original_model):
        fully_shard(block, mesh=mesh)


def is_sharded(model: Model) -> bool:
    """Whether `shard` was called."""
    return any(isinstance(parameter, DTensor) for parameter in model.original_model.parameters())


def check_whole(model: Model, what: str, instead: str) -> None:
    """Raise ValueError if the model is sharded, for what needs it whole in each process; with what to do instead."""
    if is_sharded(model):
        raise ValueError(f"{what} need a model that is whole in each process, and this one is sharded: {instead}")
