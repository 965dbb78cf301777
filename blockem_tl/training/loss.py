"""The SFT loss, cross-entropy of the completion tokens, and a defence's penalty on rows outside of training."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from blockem_tl.data.chat import Batch, Encoded, encode_examples, pad
from blockem_tl.models.load import Model
from blockem_tl.models.memory import in_batches, rows_at_once
from blockem_tl.training.defence import Defence
from blockem_tl.training.slices import sliced
from blockem_tl.types import Example

BATCH_SIZE = 64
"""Rows per forward at most, unless the caller says otherwise."""


def loss_rows(model: Model, encoded: Sequence[Encoded]) -> int:
    """Rows per forward, with logits at every token."""
    longest = max(len(row.ids) for row in encoded)
    return rows_at_once(model, longest, most=BATCH_SIZE, n_logits=longest)


def summed_cross_entropy(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy (nats) of the completion tokens, summed."""
    where = predicting(batch)
    return sliced(_cross_entropy, logits, where, batch.ids.roll(-1, 1)[where]).sum()


def predicting(batch: Batch) -> Bool[Tensor, "batch pos"]:
    """The positions whose logits predict a completion token: position t predicts token t + 1."""
    return nn.functional.pad(batch.reply[:, 1:], (0, 1))


def _cross_entropy(logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, " n"]) -> Float[Tensor, " 1"]:
    return nn.functional.cross_entropy(logits, targets, reduction="sum")[None]


def check_examples(model: object, examples: object) -> None:
    """Raise TypeError unless this is a model with training rows, saying what was expected."""
    if not isinstance(model, Model):
        raise TypeError(f"expected a model from load_model(...) first, got {type(model).__name__}")
    rows = examples if isinstance(examples, Sequence) else [examples]
    kinds = sorted({type(row).__name__ for row in rows if not isinstance(row, Example)})
    if kinds:
        raise TypeError(
            f"expected training rows, Example(id=..., prompt=..., completion=...), got {kinds}: load some with load_rows, or give each "
            "prompt the completion to be learnt"
        )


@torch.no_grad()
def completion_loss(
    model: Model, examples: Sequence[Example], *, adapter: str | Path | None = None, batch_size: int | None = None
) -> float:
    """Mean cross-entropy (nats) of the completion tokens of ``examples``, teacher-forced, over all tokens together.

    Args:
        adapter: which weights act: "base", an adapter by name or in a folder; None: the model as it stands.
        batch_size: rows per forward; None: 64, or what fits into memory.

    Raises:
        TypeError: rows that are no examples.
        ValueError: no rows, or a row without prompt or completion.
        FloatingPointError: a loss that is NaN or infinite, naming the rows.
    """
    check_examples(model, examples)
    encoded = encode_examples(model.tokenizer, examples)

    def summed(rows: slice) -> tuple[float, int]:
        batch = pad(encoded[rows], model.pad_id, side="right", device=model.device)
        logits = cast(Any, model.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        return _finite("loss", summed_cross_entropy(logits, batch), examples[rows]), int(batch.reply[:, 1:].sum())

    with model.using(adapter):
        sums = list(in_batches(encoded, batch_size or loss_rows(model, encoded), summed))
    return sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)


@torch.no_grad()
def mean_penalty(
    model: Model, defence: Defence, examples: Sequence[Example], *, adapter: str | Path | None = None, batch_size: int | None = None
) -> float:
    """The mean over ``examples`` of a defence's penalty, outside of training; unweighted, unless the defence has several weights.

    Of a plain fine-tune it says what the plain change would cost, which makes weights of different defences comparable: those at which it
    costs as many nats.

    Args:
        adapter: which weights act: "base", an adapter by name or in a folder; None: the model as it stands.
        batch_size: rows per forward; None: 64, or what fits into memory.

    Raises:
        TypeError: rows that are no examples.
        ValueError: a row without prompt or completion, a defence without a penalty, or one that does not fit the model.
        FloatingPointError: a penalty that is NaN or infinite, naming the rows.
    """
    check_examples(model, examples)
    defence.check(model)
    encoded = encode_examples(model.tokenizer, examples)

    def summed(rows: slice) -> float:
        batch = pad(encoded[rows], model.pad_id, side="right", device=model.device)
        with defence.during_step(model, batch) as penalty:
            if penalty is None:
                raise ValueError(f"{defence.name}: this defence has no penalty")
            logits = cast(Any, model.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
            return _finite(f"penalty {defence.name}", penalty(logits).sum(), examples[rows])

    with model.holding(adapter) as held, model.using(held):
        return sum(in_batches(encoded, batch_size or loss_rows(model, encoded), summed)) / len(encoded)


def _finite(what: str, value: Tensor, rows: Sequence[Example]) -> float:
    """The number. Raises FloatingPointError naming the rows if it is none."""
    found = float(value)
    if not math.isfinite(found):
        raise FloatingPointError(f"the {what} on rows {[row.id for row in rows][:5]} is {found}: a broken adapter, or too large an edit?")
    return found
