"""`Steering` and `Condition`: what is added to the residual stream while a reply is made."""

import hashlib
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.hooks import HasHookPoints, Hook, attached, steer


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
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
        if self.dose * self.scale and not self.direction.any():
            raise ValueError(f"steering at {self.site}: the direction is zero, so nothing would happen; dose 0 is the way to say so")
        if not torch.isfinite(self.vector).all():
            raise ValueError(f"steering at {self.site}: dose {self.dose:g} x scale {self.scale:g} x direction overflows: lower the dose")

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """dose * scale * direction, which is added to the residual stream."""
        return self.dose * self.scale * self.direction

    def hook(self) -> Hook:
        """The steering as a hook pair, for `run_with_hooks` and the like."""
        return steer(self.site, self.direction, self.dose, scale=self.scale)

    def __repr__(self) -> str:
        return f"Steering({self.site}, dose {self.dose:g} x scale {self.scale:g}, |direction| {float(self.direction.norm()):.3g})"


def _canonical(site: str) -> str:
    """One spelling of a block's input and output, which have two."""
    return re.sub(r"hook_resid_(pre|post)$", lambda found: {"pre": "hook_in", "post": "hook_out"}[found[1]], site)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Condition:
    """One steering condition: its name and its steerings, one per site; without any it is unsteered. It also acts by itself::

        with condition.apply(model):
            logits = model(tokens)

    Raises:
        TypeError: a name that is no text, steering that is no tuple of `Steering`.
        ValueError: a site given twice.
    """

    name: str
    steering: tuple[Steering, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"condition: expected a text as name, by which its replies are known, got {self.name!r}")
        if not isinstance(self.steering, (tuple, list)) or not all(isinstance(s, Steering) for s in self.steering):
            raise TypeError(
                f"condition {self.name!r}: expected steering=(Steering(...),), a tuple of them, got {type(self.steering).__name__}"
            )
        sites = [s.site for s in self.steering]
        if len(set(map(_canonical, sites))) < len(sites):
            raise ValueError(
                f"condition {self.name!r}: expected each site once, under one of its spellings, got {sites}; add the vectors instead"
            )

    def hooks(self) -> list[Hook]:
        """The steerings as hook pairs."""
        return [s.hook() for s in self.steering]

    def apply(self, model: HasHookPoints) -> AbstractContextManager[Any]:
        """Inside the block every forward of ``model`` is steered; strictly, see `attached`."""
        return attached(model, self.hooks())

    def __repr__(self) -> str:
        return f"Condition({self.name!r}, {', '.join(f'{s.site} {s.dose:+g}' for s in self.steering) or 'unsteered'})"

    @property
    def fingerprint(self) -> str:
        """Identity of the vectors and sites: sites, the contents of the directions and dose * scale; not the name."""
        digest = hashlib.sha256()
        for s in sorted(self.steering, key=lambda s: s.site):
            digest.update(f"{s.site}\0{s.dose * s.scale!r}\0{tuple(s.direction.shape)}".encode())
            digest.update(s.direction.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


UNSTEERED = Condition(name="unsteered")
