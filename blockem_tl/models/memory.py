"""The number of rows that fit into memory at once."""

from typing import Any, cast

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

from blockem_tl.models.load import Model

SHARE = 0.8
"""The part of the free memory that rows may take; the rest is for the consumer of the results, and for fragments."""


def check_batch_size(batch_size: object) -> None:
    """Raise ValueError unless it is None (ask the free memory) or a whole number above 0."""
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise ValueError(f"expected a whole number as batch_size >= 1 or None, got {batch_size!r}")


def row_bytes(model: Model, n_tokens: int) -> int:
    """Bytes that one row of ``n_tokens`` needs in a forward: keys and values, its share of the activations and of the logits.

    Attention is eager: its scores [n_heads n_tokens n_tokens] are there about three times, in float32 and in the model's dtype.
    """
    cfg, config = model.cfg, cast(Any, model.original_model).config
    width = next(model.original_model.parameters()).element_size()
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    kv = 2 * cfg.n_layers * heads * cfg.d_head * n_tokens * width
    scores = cfg.n_heads * n_tokens * n_tokens * (4 + 2 * width)
    activations = n_tokens * (8 * cfg.d_model + 4 * (cfg.d_mlp or 4 * cfg.d_model)) * width
    return kv + scores + activations + 12 * int(getattr(config, "vocab_size", cfg.d_vocab))


def rows_at_once(model: Model, n_tokens: int, *, most: int) -> int:
    """The rows of ``n_tokens`` that fit into ``SHARE`` of the free memory, at least 1 and at most ``most``."""
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    return max(1, min(int(SHARE * free) // row_bytes(model, n_tokens), most))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch might have worked."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
