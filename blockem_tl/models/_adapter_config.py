"""Every field of peft's adapter_config.json, on one list: supported, without effect on a trained adapter, or refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig

from blockem_tl.storage import files

SUPPORTED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
"""Fields that act here as in peft; `tests/models/test_adapter_configs.py` compares the logits."""

WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "monteclora_config",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "velora_config",
    "ensure_weight_tying",
)
"""Fields about how an adapter was begun, trained or stored: loading one does not depend on them."""

_SAVE_ANEW = "merge it into its model (peft's merge_and_unload) and load that, or train plain LoRA"
REFUSED: Mapping[str, str] = {
    "modules_to_save": f"whole copies of base modules would act besides LoRA; {_SAVE_ANEW}",
    "bias": f"biases of the base model would be changed; {_SAVE_ANEW}",
    "trainable_token_indices": f"rows of the embedding would be changed; {_SAVE_ANEW}",
    "target_parameters": f"LoRA on parameters that are no linear layer cannot be switched off here; {_SAVE_ANEW}",
    "layer_replication": f"blocks would be repeated, so that sites mean other blocks; {_SAVE_ANEW}",
    "alora_invocation_tokens": f"it would act after certain tokens only; {_SAVE_ANEW}",
    "use_qalora": f"it belongs to one quantisation of its base model; {_SAVE_ANEW}",
    "use_bdlora": f"block-diagonal LoRA is not supported; {_SAVE_ANEW}",
    "arrow_config": f"it mixes several adapters at run time; {_SAVE_ANEW}",
    "kasa_config": f"it changes the base model's weights; {_SAVE_ANEW}",
    "megatron_config": f"it belongs to Megatron's own layers; {_SAVE_ANEW}",
}
"""Fields that make an adapter more than pairs of matrices beside linear layers, and why each is refused."""

PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base model's weights alone; all others (PiSSA, OLoRA, ...) change them."""

_CONVERT = (
    "this way of beginning changes the base model's weights, so the model without the adapter would be another one. Convert it to "
    "plain LoRA with peft: model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
)
_NEUTRAL = (None, False, "none", [], {}, "")


_KEPT = (*SUPPORTED, "base_model_name_or_path", "revision", "task_type", "init_lora_weights")
"""What a configuration is made of again: the refused fields are neutral, whatever was written, and the others are of no account."""


def _known() -> set[str]:
    return {*SUPPORTED, *WITHOUT_EFFECT, *REFUSED, "peft_type", "task_type", "init_lora_weights"}


def read_config(folder: Path) -> LoraConfig:
    """The configuration of the adapter in ``folder``.

    Raises:
        ValueError: no LoRA, or a field that is refused or unknown, by its name.
    """
    path = folder / "adapter_config.json"
    try:
        fields = files.parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON as peft writes it, got something else: {str(error)[:200]}") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        got = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"{folder}: expected a LoRA adapter (peft_type LORA), got {got!r}")
    check_fields(str(folder), fields)
    try:
        return LoraConfig(**{name: value for name, value in fields.items() if name in _KEPT})
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise ValueError(f"{path}: peft refuses this configuration: {error}") from error


def check_config(name: str, config: PeftConfig) -> None:
    """Raise ValueError for the configuration of a live adapter that is no LoRA, or more than LoRA; see `check_fields`."""
    if type(config) is not LoraConfig:
        raise ValueError(f"adapter {name!r}: expected LoRA, got {type(config).__name__}")
    check_fields(f"adapter {name!r}", config.to_dict())


def check_fields(what: str, fields: Mapping[str, Any]) -> None:
    """Raise ValueError naming the field that is refused, unknown or of a wrong type, and what to do. ``what``: the adapter, in errors."""
    for field, reason in REFUSED.items():
        if fields.get(field) not in _NEUTRAL:
            raise ValueError(f"{what}: {field} = {str(fields[field])[:80]} is not supported: {reason}")
    unknown = sorted(field for field, value in fields.items() if field not in _known() and value not in _NEUTRAL)
    if unknown:
        raise ValueError(f"{what}: unknown fields {unknown} in adapter_config.json, written by another version of peft; {_SAVE_ANEW}")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"{what}: expected an adapter of a causal language model, got task_type {fields['task_type']!r}")
    init = fields.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise ValueError(f"{what}: init_lora_weights = {init!r} is not supported: {_CONVERT}")
    _check_numbers(what, fields)


def _check_numbers(what: str, fields: Mapping[str, Any]) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(fields.get(name) or {}, Mapping):
            raise ValueError(f"{what}: expected {name} as numbers by module name, got {str(fields[name])[:80]!r}")
    ranks = [fields.get("r", 8), *(fields.get("rank_pattern") or {}).values()]
    alphas = [fields.get("lora_alpha", 8), *(fields.get("alpha_pattern") or {}).values()]
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 for rank in ranks):
        raise ValueError(f"{what}: expected whole ranks above 0, got {ranks}")
    if not all(isinstance(alpha, (int, float)) and alpha == alpha and abs(alpha) < float("inf") for alpha in alphas):
        raise ValueError(f"{what}: expected finite numbers as lora_alpha, got {alphas}")
    targets = fields.get("target_modules")
    if not isinstance(targets, (str, list, tuple, set)) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{what}: expected target_modules as a pattern or a list of module names, got {targets!r}")
