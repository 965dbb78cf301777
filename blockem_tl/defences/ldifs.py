"""LDIFS: keep the features of chosen sites near base's in L2 (Mukhoti et al. 2024)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from blockem_tl.data.chat import Batch
from blockem_tl.hooks import record, resolve
from blockem_tl.models.activations import base_activations
from blockem_tl.models.load import Model
from blockem_tl.training.defence import PenaltyFn, Positions, acting_tokens, check_positions


def feature_distance(
    features: Float[Tensor, "batch pos d_model"], reference: Float[Tensor, "batch pos d_model"], where: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Mean over the tokens in ``where`` of |h_t - h_t(base)|^2, per example. Raises ValueError for an example without such a token."""
    counts = where.sum(-1)
    if (counts == 0).any():
        raise ValueError("LDIFS: expected at least one such token in every example; an empty completion has none")
    return ((features.float() - reference.float()).square().sum(-1) * where).sum(-1) / counts


@dataclass(frozen=True, kw_only=True)
class LDIFS:
    """Keep features near base's: per example, the sum over sites of the mean squared L2 distance over completion tokens.

    At the one site that `Blocking` acts on this is a residual anchor, its rival without an SAE. positions="all": questions too.

    The paper takes features of many layers of an image encoder; the residual stream after every few blocks is the counterpart. The
    distance is in the residual stream's own units (its squared norm grows with depth), so weights do not carry over between models.

    Raises:
        ValueError: a weight that is not a positive number, no sites, a site given twice, or unknown positions.
    """

    sites: Sequence[str]
    weight: float
    positions: Positions = "completion"
    name: str = "ldifs"

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"LDIFS weight: expected a finite weight > 0, got {self.weight}")
        if isinstance(self.sites, str) or not self.sites or len(set(self.sites)) < len(self.sites):
            raise ValueError(f"LDIFS: expected a list of distinct sites, got {self.sites!r}")
        check_positions(self.positions)

    def check(self, model: Model) -> None:
        """Raise ValueError for a site that the model has not."""
        for site in self.sites:
            resolve(model.hook_dict, site)

    @contextmanager
    def during_step(self, model: Model, batch: Batch) -> Iterator[PenaltyFn]:
        """Read base's and the tuned model's features at every site; yields the penalty."""
        reference, where = base_activations(model, batch, self.sites), acting_tokens(batch, self.positions)
        store: dict[str, Tensor] = {}

        def penalty(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
            distances = [feature_distance(store[site], reference[site], where) for site in self.sites]
            return torch.stack(distances).sum(0)

        with model.hooks(fwd_hooks=[record(site, store, detach=False) for site in self.sites]):
            yield penalty
