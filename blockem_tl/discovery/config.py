"""Hyperparameters of discovery. The defaults are the paper's (Table 1, B.2, D.4)."""

from dataclasses import dataclass, field
from typing import Literal

from blockem_tl.types import Counts

GRID = tuple(round(0.05 * i, 2) for i in range(16))  # 0, 0.05, ..., 0.75
EXTENDED_GRID = tuple(round(0.05 * i, 2) for i in range(31))  # 0, 0.05, ..., 1.5, for promising latents


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much incoherence a dose may cost: at most ``tau``, or with ``relative`` at most ``tau`` above the unsteered rate.

    A judge that calls many unsteered replies incoherent makes the flat budget reject every dose; the relative one does not.
    """

    tau: float = 0.10
    relative: bool = False

    def allows(self, counts: Counts, unsteered: Counts) -> bool:
        """Whether replies with these counts are within the budget (eq. 8)."""
        limit = self.tau + (unsteered.incoherent_rate if self.relative else 0.0)
        return counts.incoherent_rate <= limit + 1e-9


@dataclass(frozen=True, kw_only=True)
class DiscoveryConfig:
    """Hyperparameters of stages 1 to 3; the defaults are the paper's (Table 1, B.2, D.4).

    read: "prompts" measures shifts on the prompts alone, "replies" on each prompt with the tuned model's reply (the same text for both).
    batch_size: rows that run at once on the model itself; None asks the free memory.
    full_grid: ask every condition of stages 2 and 3 on every prompt (for figures), instead of stopping as soon as the latent set is
        certain. The latent set is the same.
    """

    n_plus: int = 250
    n_minus: int = 250
    read: Literal["prompts", "replies"] = "prompts"
    induce_dose: float = 0.7
    repair_dose: float = 0.4
    keep: int = 40
    rank_by: Literal["both", "induction"] = "both"
    grid: tuple[float, ...] = GRID
    extended_grid: tuple[float, ...] = EXTENDED_GRID
    promising: float = 0.042
    budget: Budget = field(default_factory=Budget)
    n_latents: int = 20
    rule: Literal["both", "repair"] = "repair"
    valid_only: bool = True
    max_new_tokens: int = 200
    batch_size: int | None = None
    full_grid: bool = False


PAPER = DiscoveryConfig()
FLAT = PAPER.budget
