"""CAFT: project undesired directions out of the forward in training, not at test time (Casademunt et al. 2025)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from blockem_tl.data.chat import Batch
from blockem_tl.defences.directions import check_direction, on_tuned_only
from blockem_tl.hooks import ablate
from blockem_tl.models.load import Model
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.latents import decoder_directions
from blockem_tl.training.defence import NoPenalty


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptAblation(NoPenalty):
    """h <- h - Q Q^T h at each site and every position, Q an orthonormal basis of that site's directions.

    Gradients flow through the projection, so what training learns does not run through the ablated span.

    Args:
        directions: site -> [d_model] or [n_directions d_model].

    Raises:
        ValueError: no site, or directions that are zero or not finite.
    """

    directions: Mapping[str, Float[Tensor, "*n_directions d_model"]]
    name: str = "caft"

    def __post_init__(self) -> None:
        if not self.directions:
            raise ValueError("CAFT: expected directions to ablate at one site at least, got none")
        for rows in self.directions.values():
            check_direction(self.name, rows)

    @staticmethod
    def of(latent_sets: Sequence[LatentSet], saes: Sequence[SAE[Any]]) -> "ConceptAblation":
        """A defence that ablates the decoder directions of each set's latents at its site.

        Raises:
            ValueError: an SAE that is not its set's, or two sets at one site.
        """
        for latent_set, sae in zip(latent_sets, saes, strict=True):
            latent_set.check_sae(sae)
        if len({latent_set.site for latent_set in latent_sets}) < len(latent_sets):
            raise ValueError("CAFT: expected one latent set per site; take their union first")
        return ConceptAblation(directions={k.site: decoder_directions(sae, k.latents) for k, sae in zip(latent_sets, saes, strict=True)})

    def check(self, model: Model) -> None:
        """Raise ValueError for a site that the model has not, directions of another width, or as many as the width (nothing is left)."""
        for site, rows in self.directions.items():
            check_direction(self.name, rows, model, site)
            if rows.ndim == 2 and len(rows) >= rows.shape[1]:
                raise ValueError(f"CAFT at {site}: {len(rows)} directions may span all {rows.shape[1]} dimensions; choose fewer latents")

    @contextmanager
    def during_step(self, model: Model, batch: Batch) -> Iterator[None]:
        """Ablate in the tuned forward; no penalty."""
        with model.hooks(fwd_hooks=[on_tuned_only(model, ablate(site, rows)) for site, rows in self.directions.items()]):
            yield None
