"""The change of what an SAE leaves out: the way by which a blocked change can still pass."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor


def error_movement(
    sae: SAE[Any],
    states: Float[Tensor, "batch pos d_model"],
    reference: Float[Tensor, "batch pos d_model"],
    where: Bool[Tensor, "batch pos"],
) -> Float[Tensor, " batch"]:
    """Mean over the tokens in ``where`` of the SAE error's squared change, per example; gradients flow to ``states``."""
    with torch.no_grad():
        before = _error(sae, reference[where])
    moved = (_error(sae, states[where]) - before).square().sum(-1)
    rows = where.nonzero()[:, 0]
    return torch.zeros(len(where), device=moved.device, dtype=moved.dtype).index_add(0, rows, moved) / where.sum(-1)


def _error(sae: SAE[Any], states: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
    states = states.to(sae.W_dec)
    return states - sae.decode(sae.encode(states))
