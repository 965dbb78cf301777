"""The KL baseline: L_SFT + lambda_KL * KL(tuned || base) on completion tokens (paper 4.2; Kaczer et al. 2025)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.data.chat import Batch
from blockem_tl.models.load import Model
from blockem_tl.training.defence import PenaltyFn
from blockem_tl.training.loss import predicting
from blockem_tl.training.slices import sliced


@dataclass(frozen=True, kw_only=True)
class KLToBase:
    """Keep the tuned model's next-token distributions near base's.

    Per example: the mean over the positions that predict a completion token of KL(tuned || base), in nats.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    weight: float
    name: str = "kl"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"KL weight: expected a finite weight >= 0, got {self.weight}")

    def check(self, model: Model) -> None:
        """Check nothing: KL needs only the model."""

    @contextmanager
    def during_step(self, model: Model, batch: Batch) -> Iterator[PenaltyFn]:
        """Run base on the batch; yields the penalty."""
        training = model.original_model.training
        model.original_model.eval()
        with torch.no_grad(), model.using("base"):
            base = cast(Any, model.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        model.original_model.train(training)
        where = predicting(batch)
        base = base[where]

        def penalty(logits: Float[Tensor, "batch pos d_vocab"] | None) -> Float[Tensor, " batch"]:
            if logits is None:
                raise ValueError(
                    f"{self.name}: it reads logits, and this trainer's loss builds none; use transformers' Trainer, or finetune"
                )
            kl = torch.zeros(where.shape, device=logits.device)
            kl[where] = sliced(_divergence, logits, where, base)
            return kl.sum(-1) / where.sum(-1)

        yield penalty


def _divergence(tuned: Float[Tensor, "n d_vocab"], base: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """KL(tuned || base) of each token's next-token distribution, in nats."""
    ours, anchor = tuned.log_softmax(-1), base.float().log_softmax(-1)
    return (ours.exp() * (ours - anchor)).sum(-1)
