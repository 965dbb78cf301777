"""Peft in a bridged model: which modules an adapter targets, under which names, and how LoRA layers are taken out again.

A bridge renames modules: a plain ``layers.0.mlp.up_proj`` lies at ``layers.0.mlp.up_proj._original_component``. peft sees the bridged
paths; everything that is saved has the plain ones.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from blockem_tl.models._adapter_config import check_config

WRAPPER = "._original_component"


def check_live(peft: PeftModel) -> None:
    """Raise ValueError for a live PeftModel whose adapters are more than LoRA, merged into the weights, or act several at once."""
    for name, config in peft.peft_config.items():
        check_config(name, config)
        if name == "base":
            raise ValueError(f"adapter {name!r}: expected LoRA under a name other than 'base', which means the weights without an adapter")
    active = peft.active_adapters
    if len(active) != 1:
        raise ValueError(f"expected one active adapter, got {active}: call set_adapter(name) first, or combine them (add_weighted_adapter)")
    merged = sorted({name for layer in tuner_layers(peft) for name in layer.merged_adapters})
    if merged:
        raise ValueError(f"adapters {merged} are merged into the weights, so the base model is not there: call unmerge_adapter() first")


def bridged_config(hf: nn.Module, config: LoraConfig) -> LoraConfig:
    """The same adapter with the module paths of a bridged model: full paths as targets, and each module's own rank and alpha.

    Raises:
        ValueError: it targets nothing, or modules that the bridge has renamed (as it does to GPT-2's attention).
    """
    bridged = {path.replace(WRAPPER, ""): path for path in _linear_paths(hf)}
    plain = [path for path in _linear_paths(_skeleton(hf)) if _is_targeted(config, path)]
    if not plain:
        raise ValueError(f"LoRA targets {config.target_modules} match no module: this model's linear modules are called {_kinds(bridged)}")
    renamed = [path for path in plain if path not in bridged]
    if renamed:
        raise ValueError(
            f"TransformerLens's bridge renames {len(renamed)} of the targeted modules, e.g. {renamed[0]}, so an adapter on "
            "them could not be saved for other tools: choose narrower target_modules, e.g. mlp.c_proj instead of c_proj"
        )

    def by_path(pattern: dict[str, int]) -> dict[str, int]:
        keys = {path: get_pattern_key(list(pattern), path) for path in plain}
        return {re.escape(bridged[path]): pattern[key] for path, key in keys.items() if key in pattern}

    patterns = {name: by_path(getattr(config, name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    resolved = {"target_modules": [bridged[path] for path in plain], "exclude_modules": None, "init_lora_weights": True}
    return LoraConfig(**{**config.to_dict(), **resolved, **patterns, "layers_to_transform": None, "layers_pattern": None})


def check_targets(hf: nn.Module, targets: Sequence[str]) -> None:
    """Raise ValueError for a module name that matches no linear module: an adapter would quietly be smaller than it was asked to be."""
    paths = _linear_paths(_skeleton(hf))
    unmatched = [target for target in targets if not any(path == target or path.endswith(f".{target}") for path in paths)]
    if unmatched:
        raise ValueError(f"LoRA targets {unmatched} match no module: this model's linear modules are called {_kinds(paths)}")


def _kinds(paths: Iterable[str]) -> list[str]:
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def _is_targeted(config: LoraConfig, path: str) -> bool:
    """Peft's own rule: names or pattern, exclusions, layers."""
    if config.target_modules == "all-linear":
        return path.rsplit(".", 1)[-1] != "lm_head"
    return bool(check_target_module_exists(config, path))


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


def linear_kinds(hf: nn.Module) -> list[str]:
    """Names, with their last parents, of the blocks' linear modules that LoRA can wrap here and that other tools know."""
    bridged = {path.replace(WRAPPER, "") for path in _linear_paths(hf)}
    plain = [path for path in _linear_paths(_skeleton(hf)) if re.search(r"\.\d+\.", path)]
    wrapped, renamed = ({".".join(p.split(".")[-2:]) for p in plain if (p in bridged) == there} for there in (True, False))
    return sorted(wrapped - renamed)


def tuner_layers(hf: nn.Module) -> list[BaseTunerLayer]:
    """The LoRA layers inside a model."""
    return [module for module in hf.modules() if isinstance(module, BaseTunerLayer)]


def take_out(hf: nn.Module, name: str) -> None:
    """Take the adapter out of every layer that has it, and put the plain linear layer back where it was the only one.

    (peft's `unload` would tear out whole bridge modules, which pass its attribute test.)
    """
    for module in list(hf.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, BaseTunerLayer):
                if name in _adapters_in(child):
                    child.delete_adapter(name)
                if not _adapters_in(child):
                    setattr(module, child_name, child.get_base_layer())
    if not tuner_layers(hf):
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            hf.__dict__.pop(attribute, None)


def _adapters_in(layer: BaseTunerLayer) -> set[str]:
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part, {})}


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
