"""Preventative steering: add the misalignment direction in training, drop it at test time (persona vectors, Chen et al. 2025)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from blockem_tl.data.chat import Batch
from blockem_tl.defences.directions import check_direction, on_tuned_only
from blockem_tl.hooks import steer
from blockem_tl.models.load import Model
from blockem_tl.training.defence import NoPenalty


@dataclass(frozen=True, kw_only=True, eq=False)
class PreventativeSteering(NoPenalty):
    """Add dose * scale * direction at ``site`` and every position, in training only: what is given need not be learnt.

    Args:
        direction: [d_model], pointing to misalignment, unit norm for doses to mean what they mean in the paper
            (see `misaligned_direction`).
        dose: dimensionless, > 0.  scale: the site's median norm.

    Raises:
        ValueError: no direction, a zero or non-finite one, or a dose or scale that is not a positive number.
    """

    site: str
    direction: Float[Tensor, " d_model"]
    dose: float
    scale: float
    name: str = "preventative"

    def __post_init__(self) -> None:
        check_direction(self.name, self.direction)
        if self.direction.ndim != 1:
            raise ValueError(f"preventative steering: expected one direction [d_model], got {tuple(self.direction.shape)}; add them up")
        if not (0 < self.dose < float("inf") and 0 < self.scale < float("inf")):
            raise ValueError(
                f"preventative steering: expected a dose and a scale > 0 along the misaligned direction, got {self.dose} and {self.scale}"
            )

    def check(self, model: Model) -> None:
        """Raise ValueError for a site that the model has not, or a direction of another width."""
        check_direction(self.name, self.direction, model, self.site)

    @contextmanager
    def during_step(self, model: Model, batch: Batch) -> Iterator[None]:
        """Steer the tuned forward; no penalty."""
        hook = steer(self.site, self.direction, self.dose, scale=self.scale)
        with model.hooks(fwd_hooks=[on_tuned_only(model, hook)]):
            yield None
