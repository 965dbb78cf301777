"""Losses over the vocabulary in slices of tokens, so that there is never a float32 copy of all logits."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SLICE = 2**27
"""Logits that are copied to float32 at once (512 MB), in the backward too."""


def sliced(
    function: Callable[..., Tensor], logits: Float[Tensor, "batch pos d_vocab"], where: Bool[Tensor, "batch pos"], *others: Tensor
) -> Float[Tensor, " n"]:
    """``function(logits[where].float(), *others)``, of as many tokens at once as are not too many, one result after the other.

    The backward runs each slice again instead of keeping it, to the same gradient.

    Args:
        function: from logits in float32 [n d_vocab] to a vector; run twice, so it must do the same twice.
        others: [n ...], what belongs to the tokens; no gradient flows there.
    """
    if where.numel() * logits.shape[-1] <= SLICE:
        return function(logits[where].float(), *others)
    return cast(Tensor, _Sliced.apply(function, logits, where, *others))


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], logits: Tensor, where: Tensor, *others: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(logits, where, *others)
        parts = [function(logits[at].float(), *own) for at, own in _slices(logits, where, others)]
        ctx.lengths = [len(part) for part in parts]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, where, *others = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for (at, own), part in zip(_slices(logits, where, others), upstream.split(ctx.lengths), strict=True):
            with torch.enable_grad():
                rows = logits[at].detach().requires_grad_(True)
                gradient[at] = torch.autograd.grad(ctx.function(rows.float(), *own), rows, part)[0]
        return None, gradient, None, *(None for _ in others)


def _slices(logits: Tensor, where: Tensor, others: Any) -> Iterator[tuple[tuple[Tensor, Tensor], list[Tensor]]]:
    """(row, position) of the tokens, and what belongs to them, ``SLICE`` logits at a time."""
    size = max(1, SLICE // logits.shape[-1])
    rows, positions = where.nonzero(as_tuple=True)
    for start in range(0, max(1, len(rows)), size):
        chosen = slice(start, start + size)
        yield (rows[chosen], positions[chosen]), [other[chosen] for other in others]
