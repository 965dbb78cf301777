"""`measure`: the card of an SAE, what it is worth on rows that it was not trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor

from blockem_tl.data.chat import Batch, Rows
from blockem_tl.hooks import Hook, patch
from blockem_tl.models.activations import read_site
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.fit import reconstruct
from blockem_tl.saes.latents import encode_all
from blockem_tl.saes.load import check_fits
from blockem_tl.types import check_names
from blockem_tl.views.results import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class SAECard(Result):
    """What an SAE is worth, corpus by corpus and adapter by adapter.

    rows: corpus, adapter, tokens, explained_variance (of tokens that are no sinks), l0 (latents active at a token), loss (nats per token,
    of replies where there are any), loss_spliced (with the reconstruction in the stream's place, sinks left as they are), loss_ablated
    (with the stream's mean there), loss_recovered (1: as good as the stream itself; 0: as bad as its mean; None if the mean is no
    worse).
    alive: share of latents active anywhere on these rows.
    """

    sae: SAE[Any]
    site: str
    rows: tuple[Mapping[str, Any], ...]
    alive: float

    def headline(self) -> str:
        """Site, size, the worst explained variance, and the share of latents alive."""
        worst = min(row["explained_variance"] for row in self.rows)
        return f"{self.sae.cfg.d_sae} latents at {self.site}, explained variance {worst:.3f} at least, {100 * self.alive:.0f} % alive"

    def to_frame(self) -> pd.DataFrame:
        """The card."""
        return pd.DataFrame(list(self.rows))


@torch.no_grad()
def measure(
    model: Model, sae: SAE[Any], corpora: Mapping[str, Rows], *, adapters: Sequence[str | Path] = (BASE,), limit: float = float("inf")
) -> SAECard:
    """The card of ``sae`` on these rows, under each adapter.

    Args:
        limit: tokens with a norm above it are attention sinks: not read, and left as they are when the reconstruction is spliced in. The
            first token of a row always is.

    Raises:
        ValueError: an SAE that does not fit the model, or no rows.
    """
    site = check_fits(sae, model)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.W_dec.device)
    rows = []
    for adapter in check_names("measure(adapters=)", adapters, such_as="plain"):
        with model.using(adapter):
            for name, read in corpora.items():
                sums = _Sums()
                for activations, batch in read_site(model, site, read):
                    sums.add(model, sae, site, activations, batch, limit, fired)
                rows.append({"corpus": name, "adapter": str(adapter), **sums.row()})
    if not rows:
        raise ValueError("measure: expected at least one corpus and one adapter, got none")
    return SAECard(sae=sae, site=site, rows=tuple(rows), alive=float(fired.float().mean()))


class _Sums:
    """Running sums over batches, so that memory holds one batch."""

    def __init__(self) -> None:
        self.n = self.active = self.predicted = 0
        self.squared = self.lost = 0.0
        self.total: Tensor | float = 0.0
        self.losses = {"loss": 0.0, "loss_spliced": 0.0, "loss_ablated": 0.0}

    def add(
        self, model: Model, sae: SAE[Any], site: str, h: Float[Tensor, "batch pos d_model"], batch: Batch, limit: float, fired: Tensor
    ) -> None:
        kept: Bool[Tensor, "batch pos"] = batch.mask & (batch.positions > 0) & (h.float().norm(dim=-1) <= limit)
        states = h[kept].float()
        latents = encode_all(sae, states)
        given_back = reconstruct(sae, states)
        fired |= (latents > 0).any(0)
        self.n, self.active = self.n + len(states), self.active + int((latents > 0).sum())
        self.total = self.total + states.sum(0)
        self.squared, self.lost = self.squared + float(states.square().sum()), self.lost + float((states - given_back).square().sum())
        spliced, ablated = (h.masked_scatter(kept[..., None], x.to(h)) for x in (given_back, states.mean(0).expand_as(states)))
        for name, hooks in (("loss", []), ("loss_spliced", [patch(site, spliced)]), ("loss_ablated", [patch(site, ablated)])):
            self.losses[name] += _summed_loss(model, batch, hooks)
        self.predicted += int(_predicted(batch).sum())

    def row(self) -> dict[str, float | None]:
        variance = self.squared - float(torch.as_tensor(self.total).square().sum()) / self.n
        clean, spliced, ablated = (value / self.predicted for value in self.losses.values())
        return {
            "tokens": self.n,
            "explained_variance": 1 - self.lost / variance,
            "l0": self.active / self.n,
            "loss": clean,
            "loss_spliced": spliced,
            "loss_ablated": ablated,
            "loss_recovered": (ablated - spliced) / (ablated - clean) if ablated > clean else None,
        }


def _predicted(batch: Batch) -> Bool[Tensor, "batch next"]:
    """The tokens that count in the loss: the replies', which the model was taught, or all of rows that are prompts alone."""
    return (batch.reply if batch.reply.any() else batch.mask)[:, 1:]


def _summed_loss(model: Model, batch: Batch, hooks: Sequence[Hook]) -> float:
    """Cross-entropy (nats) of the tokens that count, summed."""
    with model.hooks(fwd_hooks=hooks):
        logits = cast(Any, model.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
    read = _predicted(batch)
    return float(torch.nn.functional.cross_entropy(logits[:, :-1][read].float(), batch.ids[:, 1:][read], reduction="sum"))
