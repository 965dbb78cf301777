"""Prompts below the first block that something acts on: computed once, and entered above as often as it is needed.

With conditions that steer from block s on, a prompt runs through the blocks below s once, whatever the number of conditions::

    embed - 0 - ... - s-1        once per prompt: keys, values, and the residual stream h
                       |
                       h - s - ... - logits        once per row
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blockem_tl.data.chat import Batch, Encoded, pad
from blockem_tl.generation._decoder import Decoder
from blockem_tl.generation._kv_cache import SlotCache
from blockem_tl.generation._partial_forward import run_until_block, start_at_block
from blockem_tl.hooks import record
from blockem_tl.models.load import Model

PREFILL_TOKENS, PREFILL_TOKENS_ON_CPU = 16384, 1024
"""Prompt tokens that are prefilled together at most, padding included: as many as still speed it up. It bounds a prefill's activations."""
SHARED_TOKENS = 16384
"""Prompt tokens, padding included, whose states, keys and values are kept at most."""


def prefill_tokens(model: Model) -> int:
    """Number of tokens to prefill together on the model's device."""
    return PREFILL_TOKENS_ON_CPU if model.device.type == "cpu" else PREFILL_TOKENS


def row_index(rows: Sequence[int], device: torch.device) -> Int[Tensor, " rows"] | slice:
    """Indices to take rows by: a slice where they follow each other, which takes them without a copy."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def stream_into(block: int) -> str:
    """The name, in every model, of the residual stream that enters ``block`` (from 1 on)."""
    return f"blocks.{block - 1}.hook_out"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefilled:
    """Keys, values and states of a batch of prompts, padded on the left.

    states: by site.  keys, values: of the blocks that ran, [batch n_heads pos d_head] each; empty where they were not kept.
    """

    states: dict[str, Float[Tensor, "batch pos d_model"]]
    keys: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()

    def fill(self, cache: SlotCache, first: int, chosen: Int[Tensor, " rows"] | slice, width: int) -> None:
        """Write keys and values below block ``first`` into the rows that ``cache`` expects: these prompts', ``width`` wide."""
        for layer in range(first):
            cache.update(self.keys[layer][chosen, :, -width:], self.values[layer][chosen, :, -width:], layer)


@torch.no_grad()
def prefill(model: Model, batch: Batch, sites: Sequence[str], stop: int, *, keep: bool) -> Prefilled:
    """Run the model as it stands over ``batch`` (padded on the left), as many rows at once as still help, up to block ``stop``.

    Args:
        sites: whose states are wanted, below ``stop``.
        keep: whether keys and values are wanted.
    """
    (n_rows, width), found = batch.ids.shape, list[dict[str, Tensor]]()
    at_once = max(1, prefill_tokens(model) // width)
    cache = SlotCache(n_rows, width) if keep else None
    for start in range(0, n_rows, at_once):
        some, store = slice(start, min(start + at_once, n_rows)), dict[str, Tensor]()
        if cache is not None:
            cache.expect_newcomers(start, some.stop - start, width, width)
        inputs: dict[str, Any] = {"input_ids": batch.ids[some], "attention_mask": batch.mask[some], "position_ids": batch.positions[some]}
        with model.hooks(fwd_hooks=[record(site, store) for site in sites]):
            run_until_block(model, stop, **inputs, past_key_values=cache, use_cache=cache is not None)
        found.append(store)
    states = {site: torch.cat([store[site] for store in found]) for site in sites}
    if cache is None or stop == 0:
        return Prefilled(states=states)
    layers: list[Any] = cache.layers[:stop]
    keys, values = (
        [stored[:, :, : cache.end] for stored in tensors] for tensors in zip(*((k.keys, k.values) for k in layers), strict=True)
    )
    return Prefilled(states=states, keys=keys, values=values)


class SharedDecoder(Decoder):
    """A decoder whose rows start at a block; below it each prompt runs once, when the first row joins.

    No hook may act below ``start_at_block``.

    Args:
        prompts: by prompt index.
    """

    def __init__(self, *args: Any, start_at_block: int, prompts: Mapping[int, Encoded], **options: Any) -> None:
        super().__init__(*args, **options)
        self.first, self.prompts = start_at_block, prompts
        self.position_of = {p: i for i, p in enumerate(prompts)}

    @cached_property
    def below(self) -> Prefilled:
        """Keys, values and states of the prompts below ``first``."""
        batch = pad(list(self.prompts.values()), self.model.pad_id, side="left", device=self.model.device)
        return prefill(self.model, batch, [stream_into(self.first)], self.first, keep=True)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *, is_prompt: bool) -> Float[Tensor, "batch d_vocab"]:
        if not is_prompt:
            return super()._forward(ids, mask, positions, is_prompt=False)
        below, width = self.below, ids.shape[1]
        chosen = row_index([self.position_of[row.prompt_index] for row in self.rows[self.running]], self.model.device)
        below.fill(self.cache, self.first, chosen, width)
        state = below.states[stream_into(self.first)][chosen, -width:]
        with start_at_block(self.model, self.first, state):
            return super()._forward(ids, mask, positions, is_prompt=True)
