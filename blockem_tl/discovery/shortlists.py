"""Shortlists of several sources made one, for stage 3 to rank anew (paper D.5)."""

from collections.abc import Sequence
from typing import Any

from sae_lens import SAE

from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.types import Candidate


def united(sae: SAE[Any], shortlists: Sequence[LatentSet]) -> list[Candidate]:
    """All latents of several sets of ``sae``; of one that is in several the first set's shift and sign count.

    Raises:
        ValueError: no set, another SAE's, or one whose signs are not those of its shifts (shuffled, or made without shifts).
    """
    if not shortlists:
        raise ValueError("discover: expected at least one latent set to choose among, got none; among=None looks for candidates itself")
    found: dict[int, Candidate] = {}
    for one in shortlists:
        one.check_sae(sae)
        wrong = [latent for latent, sign, shift in zip(one.latents, one.signs, one.shifts, strict=True) if not sign * shift > 0]
        if wrong:
            raise ValueError(f"discover: expected latents that moved as their signs say, got another shift for {wrong[:5]}")
        for latent, shift in zip(one.latents, one.shifts, strict=True):
            found.setdefault(latent, Candidate(latent=latent, shift=shift))
    return list(found.values())
