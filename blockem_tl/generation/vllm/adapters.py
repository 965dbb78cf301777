"""Can vLLM serve this LoRA adapter? Asked of the files, before an engine starts."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from blockem_tl.models._adapter_config import read_config
from blockem_tl.models._adapter_files import read_tensors

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""

UNSUPPORTED = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern")
"""What `Model.load_adapter` takes and vLLM does not."""


def check_adapter(folder: Path, config: PreTrainedConfig) -> int:
    """The smallest rank of vLLM's that holds the adapter in ``folder``, which fits a model of this ``config``.

    Raises:
        ValueError: no adapter there, one that is not plain LoRA, a rank too large, or tensors that fit no module of the model.
    """
    weights, description = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not weights.is_file() or not description.is_file():
        raise ValueError(
            f"{folder}: expected an adapter folder (adapter_config.json, adapter_model.safetensors); save one with save_adapter"
        )
    peft = read_config(folder)
    odd = [key for key in UNSUPPORTED if getattr(peft, key)]
    if odd:
        raise ValueError(f"{folder}: vLLM serves plain LoRA adapters, got one with {odd}: use the TransformerLens engine")
    if peft.r > RANKS[-1]:
        raise ValueError(f"{folder}: the adapter's rank {peft.r} is too large for vLLM, which serves ranks up to {RANKS[-1]}")
    read_tensors(folder)
    _check_shapes(weights, config)
    return min(rank for rank in RANKS if rank >= peft.r)


def _check_shapes(weights: Path, config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        modules: dict[str, nn.Module] = dict(AutoModelForCausalLM.from_config(config).named_modules())
    with safe_open(weights, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            module, _, matrix = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            weight = getattr(modules.get(module), "weight", None)
            width = file.get_slice(key).get_shape()[1 if matrix == "lora_A" else 0]
            if matrix not in ("lora_A", "lora_B") or weight is None or width not in weight.shape:
                raise ValueError(
                    f"{weights.parent}: the adapter does not fit {config.model_type}: {key} (width {width}) belongs to no linear layer of "
                    "the model; was it trained on another one?"
                )
