"""The number of rows that fit into memory at once, and half of it where memory runs out all the same."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from blockem_tl.data.chat import Encoded
from blockem_tl.models.load import Model

Result = TypeVar("Result")

SHARE = 0.8
"""The part of the free memory that rows may take; the rest is for the consumer of the results, and for fragments."""


def check_batch_size(batch_size: object) -> None:
    """Raise ValueError unless it is None (ask the free memory) or a whole number above 0."""
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise ValueError(f"expected a whole number as batch_size >= 1 or None, got {batch_size!r}")


def row_bytes(model: Model, n_tokens: int, *, n_logits: int = 1) -> int:
    """Bytes that one row of ``n_tokens`` needs in a forward: keys and values, its share of the activations, and logits of ``n_logits``.

    Attention is eager: its scores [n_heads n_tokens n_tokens] are there about three times, in float32 and in the model's dtype.
    """
    cfg, config = model.cfg, cast(Any, model.original_model).config
    width = next(model.original_model.parameters()).element_size()
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    kv = 2 * cfg.n_layers * heads * cfg.d_head * n_tokens * width
    scores = cfg.n_heads * n_tokens * n_tokens * (4 + 2 * width)
    activations = n_tokens * (8 * cfg.d_model + 4 * (cfg.d_mlp or 4 * cfg.d_model)) * width
    return kv + scores + activations + 12 * n_logits * int(getattr(config, "vocab_size", cfg.d_vocab))


def training_row_bytes(model: Model, n_tokens: int, *, checkpointing: bool) -> int:
    """Bytes that one row of ``n_tokens`` needs in a training step: what all blocks (with checkpointing: one) keep for the backward, and
    the logits with their gradient. A rule of thumb, as much as `blockem plan` counts or up to a quarter more (with checkpointing, half)."""
    cfg, config = model.cfg, cast(Any, model.original_model).config
    width = next(model.original_model.parameters()).element_size()
    scores = cfg.n_heads * n_tokens * n_tokens * (4 + (width if width < 4 else 0))
    block = n_tokens * (12 * cfg.d_model + 4 * (cfg.d_mlp or 4 * cfg.d_model)) * width + scores
    blocks = block + cfg.n_layers * n_tokens * cfg.d_model * width if checkpointing else cfg.n_layers * block
    return blocks + n_tokens * int(getattr(config, "vocab_size", cfg.d_vocab)) * (8 + 2 * width)


def rows_at_once(model: Model, n_tokens: int, *, most: int, n_logits: int = 1) -> int:
    """The rows of ``n_tokens`` that fit into ``SHARE`` of the free memory, at least 1 and at most ``most``."""
    return max(1, min(free_bytes(model) // row_bytes(model, n_tokens, n_logits=n_logits), most))


def free_bytes(model: Model) -> int:
    """``SHARE`` of the memory that is free on the model's device."""
    on_gpu = model.device.type == "cuda"
    return int(SHARE * (torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch might have worked."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def halved(rows: int, n_tokens: int, error: str, *, option: str, advice: str, stacklevel: int = 3) -> int:
    """Half of the rows that did not fit, with a warning that names the option to start there. To be called where no exception is held.

    Raises:
        MemoryError: it was a single row, with the advice.
    """
    clear_device_cache(garbage_collection=True)
    if rows == 1:
        raise MemoryError(f"not even one row of {n_tokens} tokens fits into memory: {advice}, or free memory. {error}")
    warnings.warn(
        f"out of memory with {rows} rows at once: going on with {rows // 2} (nothing is lost; pass {option} to start there)",
        stacklevel=stacklevel,
    )
    return rows // 2


def in_batches(rows: Sequence[Encoded], size: int, work: Callable[[slice], Result]) -> Iterator[Result]:
    """``work`` on ``size`` rows at a time, which are halved where memory runs out. Raises MemoryError if a single row does not fit."""
    start = 0
    while start < len(rows):
        chosen = slice(start, min(start + size, len(rows)))
        try:
            found = work(chosen)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = str(error)
        else:
            yield found
            start = chosen.stop
            continue
        longest = max(len(row.ids) for row in rows[chosen])  # outside of the except block, where the error would still hold the tensors
        size = halved(chosen.stop - start, longest, failed, option="batch_size", advice="shorten the rows", stacklevel=5)
