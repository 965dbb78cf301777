"""Logits only at the positions that are needed: an unembedding of 49,152 tokens is a fifth of a small model's forward."""

import inspect
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor

from blockem_tl.models.load import Model


def logits_at(model: Model, positions: Int[Tensor, " n"], **inputs: Any) -> Float[Tensor, "batch n d_vocab"]:
    """The forward's logits at these positions, counted from the end if below 0. No others are computed, where the architecture can do that.

    transformers also takes a number of last positions, which it slices: of a batch in bfloat16 on a CPU that strided product alone took
    twice the whole forward of a model of 135M. An index copies.
    """
    positions = positions.to(model.device)
    accepts = inspect.signature(model.original_model.forward).parameters
    if "logits_to_keep" in accepts:
        return cast(Any, model.hf)(**inputs, logits_to_keep=positions).logits
    return cast(Any, model.hf)(**inputs).logits[:, positions]
