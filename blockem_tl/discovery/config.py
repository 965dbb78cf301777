"""Hyperparameters of discovery. The defaults are the paper's (Table 1, B.2, D.4)."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from blockem_tl.types import Counts

ScreenScore = Literal["both", "induction"]
FinalScore = Literal["both", "repair"]
CandidatesBy = Literal["shift", "attribution"]

GRID = tuple(round(0.05 * i, 2) for i in range(16))  # 0, 0.05, ..., 0.75
EXTENDED_GRID = tuple(round(0.05 * i, 2) for i in range(31))  # 0, 0.05, ..., 1.5, for latents that moved far


@dataclass(frozen=True, kw_only=True)
class MaxIncoherence:
    """The most incoherence that a dose may cost: ``rate`` (tau, eq. 8), or with ``relative`` the unsteered rate plus ``rate``.

    If a judge calls many unsteered replies incoherent, the flat limit rejects every dose; the relative one does not.
    nats: for contrastive pairs, which no judge reads: a pair is incoherent if its answers became less likely by more than this per token.
    """

    rate: float = 0.10
    relative: bool = False
    nats: float = 0.5

    def allows(self, counts: Counts, unsteered: Counts) -> bool:
        """Whether replies with these counts are within the limit."""
        limit = self.rate + (unsteered.incoherent_rate if self.relative else 0.0)
        return counts.incoherent_rate <= limit + 1e-9


@dataclass(frozen=True, kw_only=True)
class DiscoveryConfig:
    """Hyperparameters of stages 1 to 3.

    n_plus, n_minus: sizes of the candidate pool C+ and C- (eq. 5).
    candidates_by: "shift" (eq. 5), or with contrastive pairs "attribution", the latents whose changes raised the margin most.
    read: "prompts" measures shifts on the prompts alone, "replies" on each prompt with the tuned model's reply (the same text for both).
    induce_dose, repair_dose: doses of the screen.  screen_score: eq. 7 ("both") or eq. 12 ("induction", the variant IndPP).
    shortlist_size: candidates that stage 3 takes over from each of C+ and C-.
    grid: doses of stage 3.  extended_grid: more of them for latents with |shift| >= extended_grid_min_shift.
    max_incoherence: what a dose may cost.
    n_latents: the most latents in K.  final_score: eq. 9 ("both") or eq. 10 ("repair").  valid_only: both effects strictly positive.
    batch_size: rows that run at once on the model itself; None asks the free memory.
    smallest_wave: replies that are asked at a time at least. Larger waves keep many cards busy and spare fewer replies; same latent set.
    full_grid: ask every condition of stages 2 and 3 on every prompt (for figures), instead of stopping as soon as the latent set is
        certain. The latent set is the same.

    Raises:
        ValueError: a number out of its range, a choice that is none.
    """

    n_plus: int = 250
    n_minus: int = 250
    candidates_by: CandidatesBy = "shift"
    read: Literal["prompts", "replies"] = "prompts"
    induce_dose: float = 0.7
    repair_dose: float = 0.4
    shortlist_size: int = 40
    screen_score: ScreenScore = "both"
    grid: tuple[float, ...] = GRID
    extended_grid: tuple[float, ...] = EXTENDED_GRID
    extended_grid_min_shift: float = 0.042
    max_incoherence: MaxIncoherence = field(default_factory=MaxIncoherence)
    n_latents: int = 20
    final_score: FinalScore = "repair"
    valid_only: bool = True
    max_new_tokens: int = 200
    batch_size: int | None = None
    smallest_wave: int = 1
    full_grid: bool = False

    def __post_init__(self) -> None:
        for name in ("n_plus", "n_minus", "shortlist_size", "n_latents", "max_new_tokens", "smallest_wave"):
            value, least = getattr(self, name), 0 if name in ("n_plus", "n_minus") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"discovery: expected a whole number as {name}, at least {least}, got {value!r}")
        if self.n_plus + self.n_minus < 1:
            raise ValueError("discovery: expected candidates: n_plus or n_minus above 0")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"discovery: expected {name} among {choices}, got {getattr(self, name)!r}")
        doses = [self.induce_dose, self.repair_dose, *_doses("grid", self.grid), *_doses("extended_grid", self.extended_grid)]
        if (
            not all(math.isfinite(dose) and dose >= 0 for dose in doses)
            or not self.induce_dose
            or not self.repair_dose
            or not any(self.grid)
        ):
            raise ValueError(f"discovery: expected finite doses >= 0, those of the screen and one of the grid above 0, got {doses}")
        if not math.isfinite(self.extended_grid_min_shift) or not isinstance(self.max_incoherence, MaxIncoherence):
            raise ValueError(
                f"discovery: expected a finite extended_grid_min_shift and MaxIncoherence(rate=...) as max_incoherence, got "
                f"{self.extended_grid_min_shift!r} and {self.max_incoherence!r}"
            )


_CHOICES = {
    "candidates_by": ("shift", "attribution"),
    "read": ("prompts", "replies"),
    "screen_score": ("both", "induction"),
    "final_score": ("both", "repair"),
}


def checked_scale(scale: float) -> float:
    """Raise ValueError unless it can be the unit of doses."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"discover: expected the site's median norm as scale, a number above 0, got {scale!r}; None measures it")
    return scale


def warn_if_nothing_induced(effects: Iterable[float | None], what: str, *, stacklevel: int) -> None:
    """Warn unless one of these effects on base is above 0 (None: none was measured)."""
    if not any((effect or 0) > 0 for effect in effects):
        warnings.warn(
            f"{what} made base misaligned at any dose that was tried: nothing was induced. Try larger doses (propose_doses says what the "
            "model bears), more candidates or longer replies, and look whether the judge calls the tuned model's replies misaligned at all",
            stacklevel=stacklevel + 1,
        )


def _doses(name: str, grid: object) -> tuple[float, ...]:
    if not isinstance(grid, (tuple, list)) or not all(isinstance(dose, (int, float)) for dose in grid):
        raise ValueError(f"discovery: expected {name} as a tuple of doses, got {grid!r}")
    return tuple(grid)


PAPER = DiscoveryConfig()
FLAT = PAPER.max_incoherence
