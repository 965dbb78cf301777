"""BLOCK-EM: the one-sided, base-anchored penalty on chosen SAE latents (paper 3.2, A.5, eq. 11)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from blockem_tl.defence import PenaltyFn
from blockem_tl.hooks import record
from blockem_tl.latents import LatentSet
from blockem_tl.models import Model
from blockem_tl.prompts import Batch
from blockem_tl.reading import stop_layer
from blockem_tl.saes import check_fits, encode_latents

Positions = Literal["completion", "all"]


def one_sided_penalty(
    latents: Float[Tensor, "batch pos n_latents"],
    reference: Float[Tensor, "batch pos n_latents"],
    signs: Int[Tensor, " n_latents"],
    where: Bool[Tensor, "batch pos"],
) -> Float[Tensor, " batch"]:
    """L_block(x) per example: mean over the tokens in ``where`` of sum_k relu(sign_k * (z_tk - z_base_tk))^2 (eq. 11).

    Raises:
        ValueError: an example without a single token in ``where``.
    """
    counts = where.sum(-1)
    if (counts == 0).any():
        raise ValueError("blocking: expected at least one supervised token in every example; an empty completion has none")
    moved = torch.relu(signs.to(latents.dtype) * (latents - reference))
    return (moved.square().sum(-1) * where).sum(-1) / counts


@dataclass(frozen=True, kw_only=True)
class Blocking:
    """Keep the latents of a set from moving, relative to base, in their misaligned direction.

    The residual stream is read at the site by a hook; the SAE is never spliced into the forward. The reference is the same weights with
    the adapter off, on the same tokens, run without gradient and stopped just above the site.

    Args:
        weight: lambda.
        positions: "completion" penalises the label-bearing tokens, as in the paper; "all" also the prompt (not template or padding).

    Raises:
        ValueError: a weight that is negative or not finite, or a latent set made with another SAE.
    """

    latent_set: LatentSet
    sae: SAE[Any]
    weight: float
    positions: Positions = "completion"
    name: str = "block"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"blocking weight: expected a finite lambda >= 0, got {self.weight}")
        self.latent_set.check_sae(self.sae)

    def check(self, model: Model) -> None:
        """Raise ValueError where the SAE does not fit ``model``."""
        check_fits(self.sae, model)

    @contextmanager
    def watch(self, model: Model, batch: Batch) -> Iterator[PenaltyFn]:
        """See :class:`blockem_tl.defence.Defence`."""
        site = self.latent_set.site
        signs = torch.tensor(self.latent_set.signs, device=batch.ids.device)
        where = batch.reply if self.positions == "completion" else batch.mask & ~batch.system
        reference = self.reference(model, batch)
        store: dict[str, Tensor] = {}
        with model.hooks(fwd_hooks=[record(site, store, detach=False)]):
            yield lambda logits: one_sided_penalty(self._read(store[site]), reference, signs, where)

    @torch.no_grad()
    def reference(self, model: Model, batch: Batch) -> Float[Tensor, "batch pos n_latents"]:
        """z of base on the batch: adapter off, dropout off, forward stopped just above the site."""
        site = self.latent_set.site
        store: dict[str, Tensor] = {}
        training = model.original_model.training
        model.original_model.eval()
        try:
            with model.base():
                model.run_with_hooks(
                    batch.ids,
                    fwd_hooks=[record(site, store)],
                    attention_mask=batch.mask.long(),
                    stop_at_layer=stop_layer(model, [site]),
                )
        finally:
            model.original_model.train(training)
        return self._read(store[site])

    def _read(self, activation: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n_latents"]:
        return encode_latents(self.sae, activation, self.latent_set.latents)
