"""The SFT loss: cross-entropy of the completion tokens."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from blockem_tl.data.chat import Batch, encode_examples, pad
from blockem_tl.models.load import Model
from blockem_tl.types import Example


def summed_cross_entropy(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy (nats) of the completion tokens, summed."""
    learnt = batch.reply[:, 1:]  # position t predicts token t + 1; only the learnt rows are copied to float32
    return nn.functional.cross_entropy(logits[:, :-1][learnt].float(), batch.ids[:, 1:][learnt], reduction="sum")


@torch.no_grad()
def completion_loss(model: Model, examples: Sequence[Example], *, batch_size: int = 64) -> float:
    """Mean cross-entropy (nats) of the completion tokens of ``examples``, teacher-forced, over all tokens together."""
    encoded = encode_examples(model.tokenizer, examples)
    total, tokens = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = pad(encoded[start : start + batch_size], model.pad_id, side="right", device=model.device)
        logits = cast(Any, model.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        total += float(summed_cross_entropy(logits, batch))
        tokens += int(batch.reply[:, 1:].sum())
    return total / tokens
