"""Tiny random models of many architectures, and for each what the self-test says: None if it passes, else the check that it fails."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

IDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": False}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

SHAPES = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 6, "head_dim": 8},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "qwen3_moe": {**LLAMA, **MOE, "head_dim": 8, "decoder_sparse_step": 1},
    "gemma": {**LLAMA, "head_dim": 8},
    "gemma2": {**LLAMA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {**LLAMA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi": LLAMA,
    "phi3": {**LLAMA, "sliding_window": 6},
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmoe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "stablelm": LLAMA,
    "granite": LLAMA,
    "cohere": LLAMA,
    "starcoder2": {**LLAMA, "sliding_window": 6},
    "smollm3": LLAMA,
    "gpt_oss": {**LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 96,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 6,
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "word_embed_proj_dim": 32,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "new_decoder_architecture": False, "multi_query": True},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 96},
    "codegen": {**GPT, "rotary_dim": 4},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 96},
    "biogpt": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 96},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
}


def tiny_of(name: str):
    """A random model of the architecture, whose words change easily."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**IDS, **SHAPES[name]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=None if name == "mamba" else "eager").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    return model
