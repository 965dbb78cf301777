"""How many rows fit into memory at once, and what it looks like when they do not."""

from typing import Any, cast

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

from blockem_tl.generation._kv_cache import CHUNK
from blockem_tl.models.load import Model

SHARE = 0.8
"""Of the free memory, what the rows may take: the rest is for the consumer of the replies, and for fragments."""
MOST_ON_CPU, MOST_ON_GPU = 256, 1024


def row_bytes(model: Model, longest: int) -> int:
    """Memory that one row of ``longest`` tokens needs: keys and values, and its share of a prefill's activations and of the logits.

    Attention is eager: its scores [n_heads longest longest] are there about three times, in float32 and in the model's dtype.
    """
    cfg, config = model.cfg, cast(Any, model.original_model).config
    width = next(model.original_model.parameters()).element_size()
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    kv = 2 * cfg.n_layers * heads * cfg.d_head * (longest + CHUNK) * width
    scores = cfg.n_heads * longest * longest * (4 + 2 * width)
    activations = longest * (8 * cfg.d_model + 4 * (cfg.d_mlp or 4 * cfg.d_model)) * width
    return kv + scores + activations + 12 * int(getattr(config, "vocab_size", cfg.d_vocab))


def fitting(model: Model, longest: int) -> int:
    """The most rows of ``longest`` tokens that fit into ``SHARE`` of the free memory, at least 1 and at most what still speeds things up.

    More than that gained nothing where it was measured (see docs/generation.md).
    """
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    return max(1, min(int(SHARE * free) // row_bytes(model, longest), MOST_ON_GPU if on_gpu else MOST_ON_CPU))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch might have worked."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
