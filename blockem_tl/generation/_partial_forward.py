"""Parts of a forward: it begins at a block with a given residual stream, or ends below a block.

The bridge has `stop_at_layer` and no start. Here the model's own forward runs, so masks, position embeddings and hooks are its own. The
blocks that are left out hand on the given stream.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from blockem_tl.generation._decoder import last_logits
from blockem_tl.models.load import Model


class _Reached(Exception):  # noqa: N818 - no error: the forward has come as far as it should
    pass


@contextmanager
def start_at_block(model: Model, first: int, state: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
    """Inside the block forwards begin at block ``first`` (n_layers: at the final norm) with ``state`` as the residual stream.

    The blocks below do not run: none of their hooks fires, and they write no keys and values.
    """
    handed_on = _as_block_output(model, state)
    with _forwards(_blocks(model)[:first], lambda *args, **kwargs: handed_on):
        yield


def _as_block_output(model: Model, state: Tensor) -> Tensor | tuple[Tensor | None, ...]:
    """The state as this architecture's blocks return it: alone, or first in a tuple (GPT-J, GPT-Neo). One token is run to see which."""
    if "_block_output" not in model.__dict__:
        seen: list[Any] = []
        handle = _blocks(model)[0].register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            run_until_block(model, 1, input_ids=torch.full((1, 1), model.pad_id, device=model.device), use_cache=False)
        finally:
            handle.remove()
        model.__dict__["_block_output"] = len(seen[0]) if isinstance(seen[0], tuple) else 0
    length = model.__dict__["_block_output"]
    return (state, *[None] * (length - 1)) if length else state


def run_until_block(model: Model, stop: int, **inputs: Any) -> None:
    """Run the embedding and the blocks below ``stop``, for what hooks and a cache keep of them."""
    if stop >= model.cfg.n_layers:
        last_logits(model)(**inputs)
        return

    def halt(*args: Any, **kwargs: Any) -> None:
        raise _Reached

    with _forwards(_blocks(model)[stop : stop + 1], halt), suppress(_Reached):
        last_logits(model)(**inputs)


def _blocks(model: Model) -> list[nn.Module]:
    return list(model.blocks)


@contextmanager
def _forwards(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block the modules compute ``forward``."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module, _ in before:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own
