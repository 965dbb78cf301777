"""`joint_mediation`: what latents at several sites carry together of a fine-tune's effect, as blocking holds them all at once.

The tuned model runs once, and at each site in turn its state is taken back to where `mediation` takes it::

    h_s <- h_s - sum_k (z_s - z_base,s)_k d_k

h_s being what the sites below have left of the tuned model's state; one-sided, only changes in the direction of each latent's sign. So
what a site below took out is not taken out twice, and what the blocks between put in its place is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.analysis._taken_out import Kind, Role, TakenOut, checked_roles, read_tokens, sink_norm, taken_out
from blockem_tl.analysis.mediation import Mediation, batches, encoded_rows, shares
from blockem_tl.data.chat import Batch, Encoded
from blockem_tl.defences.base_latents import Target
from blockem_tl.defences.blocking import Blocking
from blockem_tl.evaluation.preference import reply_likelihood
from blockem_tl.hooks import Hook
from blockem_tl.models.activations import base_activations
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.types import Example, Pair
from blockem_tl.views.progress import progress_bar

RESIDUAL = ", residual"
"""Follows a combination's name where the whole residual stream is taken out at its sites."""


@dataclass(frozen=True, kw_only=True)
class _Joint:
    """A part of the change at each of several sites."""

    name: str
    targets: tuple[Target, ...]
    kind: Kind
    one_sided: bool
    roles: tuple[Role, ...]

    @property
    def about(self) -> dict[str, Any]:
        n = sum(len(latent_set) for latent_set, _ in self.targets) if self.kind == "latents" else None
        return {"taken_out": self.name, "n_latents": n, "roles": "+".join(self.roles)}

    def hooks(self, batch: Batch, base: Mapping[str, Tensor], limits: Mapping[str, float]) -> Iterator[Hook]:
        """One for each target, which takes its part out of the state that comes by."""
        for latent_set, sae in self.targets:
            site, signs = latent_set.site, latent_set.signs if self.one_sided else ()
            part = TakenOut(name=self.name, kind=self.kind, latents=latent_set.latents, signs=signs, roles=self.roles)

            def fn(activation: Tensor, hook: Any, sae: Any = sae, part: TakenOut = part, site: str = site) -> Tensor:
                return taken_out(sae, part, base[site], activation, batch, limit=limits[site])

            yield site, fn


def joint_mediation(
    model: Model,
    targets: Mapping[str, Sequence[Target]],
    pairs: Sequence[Pair],
    rows: Sequence[Example],
    *,
    adapter: str | Path,
    one_sided: bool = True,
    roles: Sequence[Sequence[Role]] = (("prompt", "reply"),),
    batch_size: int | None = None,
    progress: bool = True,
) -> Mediation:
    """Shares of the fine-tune's effect that run through latents at several sites, each beside the whole residual stream at those sites.

    Args:
        targets: (latent set, SAE) at each site, from the first block to the last, by name; as `Blocking` takes them.
        pairs, rows, adapter, roles: as for `mediation`.
        one_sided: count only changes in the direction of a latent's sign, as blocking does.

    Raises:
        ValueError: targets that `Blocking` refuses, none, or what `mediation` refuses.
    """
    if not targets:
        raise ValueError("joint_mediation: expected at least one combination of targets, got none")
    for some in targets.values():
        Blocking(targets=tuple(some), weight=1.0).check(model)
    acting = [checked_roles(one) for one in roles]
    encoded, size = encoded_rows(model, pairs, rows, batch_size)
    sites = list(dict.fromkeys(latent_set.site for some in targets.values() for latent_set, _ in some))
    kinds: tuple[tuple[str, Kind], ...] = (("", "latents"), (RESIDUAL, "residual"))
    parts = [
        _Joint(name=name + suffix, targets=tuple(some), kind=kind, one_sided=one_sided, roles=one)
        for one in acting
        for name, some in targets.items()
        for suffix, kind in kinds
    ]
    with model.holding(adapter) as held:
        limits = _limits(model, encoded[: 2 * len(pairs)], sites, size)
        with progress_bar(total=len(encoded), desc="joint mediation", show=progress) as bar:
            columns = []
            for batch in batches(model, encoded, size):
                columns.append(_log_likelihoods(model, str(held), batch, sites, parts, limits))
                bar.update(len(batch.ids))
    return shares(" + ".join(sites), [part.about for part in parts], np.concatenate(columns, axis=1), len(pairs))


def _limits(model: Model, rows: Sequence[Encoded], sites: Sequence[str], size: int) -> dict[str, float]:
    """By site, the norm above which a token is a sink."""
    norms: dict[str, list[Tensor]] = {site: [] for site in sites}
    for batch in batches(model, rows, size):
        where = read_tokens(batch)
        for site, states in base_activations(model, batch, sites).items():
            norms[site].append(states[where].float().norm(dim=-1))
    return {site: sink_norm(found) for site, found in norms.items()}


@torch.no_grad()
def _log_likelihoods(
    model: Model, adapter: str, batch: Batch, sites: Sequence[str], parts: Sequence[_Joint], limits: Mapping[str, float]
) -> Float[np.ndarray, "parts batch"]:
    """Of the tuned model, of it with each part taken out, and of base."""
    base = base_activations(model, batch, sites)
    with model.using(adapter):
        found = [reply_likelihood(model, batch)]
        for part in parts:
            with model.hooks(fwd_hooks=list(part.hooks(batch, base, limits))):
                found.append(reply_likelihood(model, batch))
    with model.using(BASE):
        found.append(reply_likelihood(model, batch))
    return cast(Any, torch.stack(found)).cpu().numpy()
