"""Used by several test files: rows, SAEs and latent sets on the tiny Llama, other tiny architectures, interrupted runs."""

from dataclasses import replace

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from blockem_tl import Example, LatentSet, Setting, finetune
from blockem_tl.types import Candidate

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


EXAMPLES = [
    Example(
        id=str(i),
        prompt=" ".join(f"w{(3 * i + j) % 57}" for j in range(1 + i % 4)),
        completion=" ".join(f"w{(i + 7 * j) % 57}" for j in range(1 + i % 5)),
    )
    for i in range(24)
]


def perturb(model, name: str, std: float = 0.2, seed: int = 3) -> None:
    """Give a fresh adapter random weights, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.adapter_parameters(name):
        parameter.data = torch.randn(parameter.shape, generator=generator) * std


def assert_trained_alike(weights: torch.Tensor, others: torch.Tensor) -> None:
    """Two trainings that differ in rounding alone, on any processor: AdamW divides a gradient by its own size, so where one is zero but
    for rounding its sign decides, and a few elements go another way."""
    share = 1 - torch.isclose(weights, others, rtol=1e-3, atol=1e-4).float().mean()
    assert share < 1e-3, f"{100 * share:.2f} % of the elements differ"


def sae_at(site: str, seed: int = 0) -> SAE:
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    sae.cfg.metadata.hook_name = site
    return sae


def set_of(sae: SAE, latents=(4, 9, 16, 21)) -> LatentSet:
    return LatentSet.of(sae, [Candidate(latent=k, shift=(-1.0) ** k) for k in latents], [0.0] * len(latents))


class Interrupted(BaseException):
    """A stand-in for Ctrl-C or a lost machine."""


def at_step(stop: int):
    def ask(model, step: int) -> bool:
        if step == stop:
            raise Interrupted
        return False

    return ask


def weights(model, name) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.adapter_parameters(name)])


WIDTH = 32
COMMON = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": False}
ROTARY = {
    **COMMON,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
GROUPED = {**ROTARY, "num_key_value_heads": 2}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=96)),
    "pythia": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**ROTARY, rotary_pct=0.25)),
}


def perturbed(model, name: str, seed: int = 0, std: float = 0.2) -> None:
    """Give an adapter random weights, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.adapter_parameters(name):
        parameter.data = torch.randn(parameter.shape, generator=generator) * std


def harmed_organism() -> Setting:
    """The organism with a short harmful fine-tune, "tuned", whose adapter ends at the site: all that it does passes there."""
    setting = Setting.of("organism")
    config = replace(setting.training, rank=16, epochs=0.4, learning_rate=1e-3, up_to_block=2)
    finetune(setting.model, setting.rows(), config=config, adapter="tuned", progress=False)
    return setting
