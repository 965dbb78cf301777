"""A Llama of some shape with random weights and a word tokenizer that has no end token, so that replies are as long as was asked for."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blockem_tl import load_model
from blockem_tl.models._sources import default_device
from blockem_tl.models.load import Model

SHAPES: dict[str, dict[str, int]] = {
    "small": dict(
        vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8
    ),
    "small-grouped": dict(
        vocab_size=2048, hidden_size=256, intermediate_size=896, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2
    ),  # Llama 3's proportions
    "smollm2-135m": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    ),
    "llama-3.2-1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8
    ),
    "llama-3.1-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    ),
}
SPECIAL = ["<pad>", "<bos>", "<unk>", "<user>", "<assistant>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %} <user> {{ m.content }}{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"


def random_llama(shape: str, *, adapter: str, context: int = 512) -> Model:
    """The model, on a GPU in bf16 where there is one, with a random LoRA adapter of rank 16 on every projection."""
    model = load_model(random_weights(shape, context=context), tokenizer=words(SHAPES[shape]["vocab_size"]))
    model.add_adapter(adapter)
    for parameter in model.adapter_parameters(adapter):
        parameter.data.normal_(std=0.05)
        parameter.requires_grad_(False)
    return model


def random_weights(shape: str, *, context: int = 512, attention: str = "eager") -> LlamaForCausalLM:
    """The same weights in plain transformers, built where they will run and in their dtype."""
    device = default_device(None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(
        **SHAPES[shape],  # pyright: ignore[reportArgumentType]
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.05,
        dtype=dtype,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def words(n_tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer of this many whole words with a chat template."""
    words = [*SPECIAL, *(f"w{i}" for i in range(n_tokens - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast
