"""Peft in a bridged model: which modules an adapter targets, under which names, and how LoRA layers are taken out again.

A bridge renames modules: a plain ``layers.0.mlp.up_proj`` lies at ``layers.0.mlp.up_proj._original_component``. peft sees the bridged
paths; everything that is saved has the plain ones.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

WRAPPER = "._original_component"


def check_plain(name: str, config: LoraConfig) -> None:
    """Raise ValueError for an adapter whose ranks or targets depend on module paths, which a bridge spells differently."""
    if config.rank_pattern or config.alpha_pattern or isinstance(config.target_modules, str):
        raise ValueError(
            f"adapter {name!r}: expected a list of target_modules without rank_pattern and alpha_pattern, which match module paths "
            "that a bridge spells differently: merge the adapter into its model, or retrain it with one rank"
        )


def bridged_paths(hf: nn.Module, config: LoraConfig) -> list[str]:
    """Full bridged module paths that a plain peft config targets.

    Raises:
        ValueError: it targets nothing, or modules that the bridge has renamed (as it does to GPT-2's attention).
    """
    plain = _targeted(config, _linear_paths(_skeleton(hf)))
    bridged = {path.replace(WRAPPER, ""): path for path in _linear_paths(hf)}
    if not plain:
        kinds = sorted({path.rsplit(".", 1)[-1] for path in bridged})
        raise ValueError(f"LoRA targets {config.target_modules} match no module: this model's linear modules are called {kinds}")
    renamed = [path for path in plain if path not in bridged]
    if renamed:
        raise ValueError(
            f"TransformerLens's bridge renames {len(renamed)} of the targeted modules, e.g. {renamed[0]}, so an adapter on "
            "them could not be saved for other tools: choose narrower target_modules, e.g. mlp.c_proj instead of c_proj"
        )
    return [bridged[path] for path in plain]


def check_reached(hf: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Raise RuntimeError unless a gradient reaches every LoRA tensor: some bridged modules bypass the layer that peft wrapped."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(hf.parameters()).device)
    with torch.enable_grad():
        total = cast(Any, hf)(input_ids=tokens, use_cache=False).logits.float().sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    missed = sum(gradient is None for gradient in gradients)
    if missed:
        raise RuntimeError(
            f"{missed} of {len(gradients)} LoRA tensors get no gradient: the bridge bypasses those modules; choose other target_modules"
        )


def tuner_layers(hf: nn.Module) -> list[BaseTunerLayer]:
    """The LoRA layers inside a model."""
    return [module for module in hf.modules() if isinstance(module, BaseTunerLayer)]


def take_out(hf: nn.Module) -> None:
    """Put the plain linear layers back. (peft's `unload` would tear out whole bridge modules, which pass its attribute test.)"""
    for module in list(hf.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, BaseTunerLayer):
                setattr(module, child_name, child.get_base_layer())
    del cast(Any, hf).peft_config


def _skeleton(hf: nn.Module) -> nn.Module:
    """The plain architecture without weights: what other tools will load an adapter into."""
    with torch.device("meta"):
        return type(hf)(cast(Any, hf).config)


def _linear_paths(hf: nn.Module) -> list[str]:
    """Paths of the modules that LoRA can wrap (or wraps already)."""
    return [
        path
        for path, module in hf.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)) and ".base_layer" not in path and "lora_" not in path
    ]


def _targeted(config: LoraConfig, paths: list[str]) -> list[str]:
    """The plain paths that a config's target_modules and layers_to_transform select, by peft's rule (the name or its ending)."""
    wanted = {config.target_modules} if isinstance(config.target_modules, str) else set(config.target_modules or ())
    layers = config.layers_to_transform
    blocks = {layers} if isinstance(layers, int) else set(layers) if layers is not None else None
    return [
        path
        for path in paths
        if any(path == target or path.endswith(f".{target}") for target in wanted) and (blocks is None or _block_index(path) in blocks)
    ]


def _block_index(path: str) -> int | None:
    """The first whole-number part of a module path: model.layers.7.mlp -> 7."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
