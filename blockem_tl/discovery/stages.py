"""Stages 2 and 3 as a `DiscoveryConfig` says, each callable alone."""

from collections.abc import Sequence
from typing import Any

from sae_lens import SAE

from blockem_tl.discovery.calibration import Calibrated, Selection, calibrate, select
from blockem_tl.discovery.config import DiscoveryConfig
from blockem_tl.discovery.racing import SteeringTests
from blockem_tl.discovery.screening import Screened, Shortlisting, screen, shortlist
from blockem_tl.types import Candidate


def shortlisted(screened: Sequence[Screened], config: DiscoveryConfig) -> list[Candidate]:
    """`shortlist` as ``config`` says, and raises as it does."""
    return shortlist(screened, size=config.shortlist_size, screen_score=config.screen_score)


def stage_two(
    tests: SteeringTests, sae: SAE[Any], pool: Sequence[Candidate], config: DiscoveryConfig, *, scale: float, progress: bool = True
) -> list[Screened]:
    """`screen` (eq. 7) of the candidates as ``config`` says; ``scale``: s. Raises NoLatents without a candidate."""
    return screen(
        tests,
        sae,
        pool,
        scale=scale,
        induce_dose=config.induce_dose,
        repair_dose=config.repair_dose,
        shortlisting=Shortlisting(size=config.shortlist_size, screen_score=config.screen_score),
        full_grid=config.full_grid,
        progress=progress,
    )


def stage_three(
    tests: SteeringTests, sae: SAE[Any], candidates: Sequence[Candidate], config: DiscoveryConfig, *, scale: float, progress: bool = True
) -> list[Calibrated]:
    """`calibrate` (eq. 8) of a shortlist as ``config`` says; ``scale``: s. Raises NoLatents without a candidate."""
    return calibrate(
        tests,
        sae,
        candidates,
        scale=scale,
        grid=config.grid,
        extended_grid=config.extended_grid,
        extended_grid_min_shift=config.extended_grid_min_shift,
        max_incoherence=config.max_incoherence,
        selection=Selection(n=config.n_latents, final_score=config.final_score, valid_only=config.valid_only),
        full_grid=config.full_grid,
        progress=progress,
    )


def chosen_by(config: DiscoveryConfig, calibrated: Sequence[Calibrated]) -> list[Calibrated]:
    """K: `select` (eq. 9, 10, 13) as ``config`` says. Raises NoLatents if none qualifies."""
    return select(calibrated, n=config.n_latents, final_score=config.final_score, valid_only=config.valid_only)
