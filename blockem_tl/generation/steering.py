"""`Steering` and `Condition`: what is added to the residual stream while a reply is made."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering:
    """h <- h + dose * scale * direction at ``site``, at every position (eq. 6).

    direction: [d_model], unit norm for doses to mean what they mean in the paper.  dose: dimensionless.  scale: the site's median norm.
    """

    site: str
    direction: Float[Tensor, " d_model"]
    dose: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not np.isfinite([self.dose, self.scale]).all() or not torch.isfinite(self.direction).all():
            raise ValueError(f"steering at {self.site}: expected a finite direction, dose and scale, got NaN or infinity")

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """What is added to the residual stream."""
        return self.dose * self.scale * self.direction


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """One steering condition: its name, and what is added at which sites (at none: unsteered). Raises ValueError for a site given twice."""

    name: str
    steering: tuple[Steering, ...] = ()

    def __post_init__(self) -> None:
        sites = [s.site for s in self.steering]
        if len(set(sites)) < len(sites):
            raise ValueError(f"condition {self.name!r}: expected each site once, got {sites}; add the vectors instead")

    @property
    def fingerprint(self) -> str:
        """Identity of what is added where: sites, the contents of the directions and dose * scale; not the name."""
        digest = hashlib.sha256()
        for s in sorted(self.steering, key=lambda s: s.site):
            digest.update(f"{s.site}\0{s.dose * s.scale!r}\0{tuple(s.direction.shape)}".encode())
            digest.update(s.direction.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


UNSTEERED = Condition(name="unsteered")
