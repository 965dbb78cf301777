"""Shortlists of several sources made one, for stage 3 to rank anew (paper D.5)."""

import math
from collections.abc import Sequence
from typing import Any

from sae_lens import SAE

from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.latents import check_latents
from blockem_tl.types import Candidate


def united(shortlists: Sequence[LatentSet]) -> list[Candidate]:
    """All latents of several sets, for ``discover(candidates=...)``; of one that is in several the first set's shift and sign count.

    For D.5 each set is the whole shortlist of a source: that of ``discover`` with a large ``n_latents`` and without ``valid_only``.

    Raises:
        ValueError: no set, or sets of different SAEs.
    """
    if len({(one.sae_fingerprint, one.site) for one in shortlists}) != 1:
        raise ValueError(f"united: expected latent sets of one SAE, got sites {sorted({one.site for one in shortlists})} of different SAEs")
    found: dict[int, Candidate] = {}
    for one in shortlists:
        for latent, shift in zip(one.latents, one.shifts, strict=True):
            found.setdefault(latent, Candidate(latent=latent, shift=shift))
    return list(found.values())


def checked(sae: SAE[Any], candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """The candidates. Raises ValueError for a latent that the SAE has not, one that is there twice, or one that did not move."""
    latents = [candidate.latent for candidate in candidates]
    check_latents(sae, latents)
    twice = sorted({latent for latent in latents if latents.count(latent) > 1})
    still = [candidate.latent for candidate in candidates if not (math.isfinite(candidate.shift) and candidate.shift)]
    if twice or still:
        raise ValueError(f"discover: expected different candidates with shifts, got latents {twice} twice and {still} without a shift")
    return candidates
