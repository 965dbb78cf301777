"""Models and SAEs of a preset without their weights: every tensor has its size and no data."""

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from blockem_tl.models.load import Model, load_model
from blockem_tl.presets import Preset
from blockem_tl.storage import embedded, files

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
KNOWN: Mapping[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "meta-llama/Llama-3.2-1B-Instruct": {
        **_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.3-70B-Instruct": {
        **_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
}  # fmt: skip
"""Shapes that can be planned for before anything is downloaded."""
RELEASES: Mapping[str, int] = {
    "goodfire-llama-3.1-8b-instruct": 65536, "llama_scope_lxr_8x": 32768, "qwen2.5-7b-instruct-andyrdt": 131072,
}  # fmt: skip
"""Latents of SAEs that SAELens lists."""


def config_of(model: str) -> PretrainedConfig:
    """The configuration of an embedded model, a folder, or a hub model: one that is known here, or lies in the hub's cache.

    Raises:
        ValueError: there is none.
    """
    if model in KNOWN:
        about = dict(KNOWN[model])
        return AutoConfig.for_model(about.pop("model_type"), **about)
    try:
        return AutoConfig.from_pretrained(str(embedded.folder_of("model", model) or model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"plan: expected a preset whose model's configuration can be had, got {model!r}: {error}") from error


def skeleton(config: PretrainedConfig, *, dtype: torch.dtype, context: int) -> Model:
    """The model as `load_model` makes it, on the "meta" device, with room for ``context`` tokens. To be made, and run, inside a `Meter`."""
    config.max_position_embeddings = max(context, config.max_position_embeddings)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    return load_model(hf, tokenizer=_words(), check="off")


def latents_of(preset: Preset, d_model: int) -> int:
    """Latents of the preset's SAE: an embedded one's own number, that of a known release, or 16 for each dimension of the model."""
    release, _ = preset.sae
    folder = embedded.folder_of("sae", release)
    return files.read_json(folder / "cfg.json")["d_sae"] if folder else RELEASES.get(release, 16 * d_model)


def _words() -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, since a plan reads no text."""
    special = ["<pad>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")
    fast.chat_template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
    return fast
