"""Interleaving: safe rows of other topics among the training rows (Kaczer et al. 2025 and the usual advice against forgetting)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from blockem_tl.training.defence import NoPenalty
from blockem_tl.types import Example


@dataclass(frozen=True, kw_only=True)
class Interleaving(NoPenalty):
    """Mix safe rows in, so that they make up ``share`` of all rows; nothing is taken out, so a run of one epoch gets longer.

    The rows are drawn without replacement and spread evenly over the training rows, both seeded by the run; the trainer shuffles
    rows anew every epoch, so that batches hold both kinds.

    Args:
        safe: harmless rows. Keep them apart from what is reported on: safe rows about the evaluation's own questions measure memory.
        share: of safe rows among all, in (0, 1).

    Raises:
        ValueError: no safe rows, or a share out of range.
    """

    safe: Sequence[Example]
    share: float
    name: str = "interleaving"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"interleaving: expected a share of safe rows in (0, 1), got {self.share}")
        if not self.safe:
            raise ValueError("interleaving: expected safe rows to mix in, got none")

    def rewrite(self, examples: Sequence[Example], *, seed: int) -> list[Example]:
        """The rows with safe ones spread evenly among them. Raises ValueError if there are too few safe rows."""
        n = max(1, round(self.share / (1 - self.share) * len(examples)))
        if n > len(self.safe):
            raise ValueError(
                f"interleaving: a share of {self.share:g} beside {len(examples)} training rows needs {n} safe rows, got {len(self.safe)}: "
                "give more, or ask for a smaller share"
            )
        safe = random.Random(seed).sample(list(self.safe), n)
        placed = [((i + 0.5) / len(rows), kind, row) for kind, rows in enumerate((examples, safe)) for i, row in enumerate(rows)]
        return [row for _, _, row in sorted(placed, key=lambda item: item[:2])]
