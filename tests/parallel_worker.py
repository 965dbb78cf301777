"""Each process of the data-parallel test: the same fine-tune, its results written by the first process."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from shared import EXAMPLES, SITES, sae_at, set_of
from torch.distributed.tensor import DTensor

from blockem_tl import Blocking, TrainingConfig, finetune, load_model
from blockem_tl.defences.kl import KLToBase
from blockem_tl.models.sharding import shard
from blockem_tl.storage import files

CONFIG = TrainingConfig(rank=4, alpha=8, batch_size=8, learning_rate=1e-2, epochs=2)


def train(model_folder: Path, out: Path, micro: int | None, reference: str = "stored", sharded: bool = False) -> None:
    """Fine-tune with blocking and KL; write history and adapter to ``out``, and how many numbers of base lie in this process."""
    torch.set_num_threads(1)
    model = load_model(model_folder, device="cpu")
    if sharded:
        shard(model)
    sae = sae_at(SITES[0])
    run = finetune(
        model,
        EXAMPLES,
        config=replace(CONFIG, micro_batch_size=micro, gradient_checkpointing=sharded),
        defences=[Blocking(latent_set=set_of(sae), sae=sae, weight=3.0, reference=reference), KLToBase(weight=0.5)],
        checkpoints=out / "checkpoints",
        progress=False,
    )
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    save_file({str(i): p.detach() for i, p in enumerate(model.adapter_parameters("default"))}, out / f"weights{rank}.safetensors")
    files.write_json(out / f"history{rank}.json", run.history)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.original_model.parameters() if not p.requires_grad)
    files.write_json(out / f"held{rank}.json", held)


def read(out: Path, rank: int = 0) -> tuple[list[dict[str, float]], torch.Tensor]:
    """History and weights of one process."""
    weights = load_file(out / f"weights{rank}.safetensors")
    return files.read_json(out / f"history{rank}.json"), torch.cat([weights[str(i)].flatten() for i in range(len(weights))])


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:5], sharded=sys.argv[5:] == ["sharded"])
