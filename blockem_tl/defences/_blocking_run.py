"""The state of one run of `Blocking`: sums for its metrics and, with ``weight="auto"``, the weights found so far."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from blockem_tl.defences.base_latents import StoredLatents

_LARGEST_STEP = 5.0  # multiples of the bound: one wild batch must not decide the weight
_PEAK = "/peak"


class BlockingRun:
    """The stored reference of a run, the sums since its metrics were last asked for, and each target's bound and multiplier.

    bounds: largest penalty allowed.  multipliers: price of the bound in nats; lambda is the multiplier over the bound.  peaks: of lambda.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget an earlier run, which may have been interrupted within a step."""
        self.stored: StoredLatents | None = None
        self.sums: dict[str, Tensor] = {}
        self.examples: dict[str, int] = {}
        self.bounds: dict[str, float] = {}
        self.multipliers: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a micro-batch: if it fails, nothing of it is counted, so that it can be run again in halves."""
        before = dict(self.sums), dict(self.examples)
        try:
            yield
        except BaseException:
            self.sums, self.examples = before
            raise

    @torch.no_grad()
    def note(
        self,
        target: str,
        latents: Float[Tensor, "batch pos n_latents"],
        reference: Float[Tensor, "batch pos n_latents"],
        signs: Int[Tensor, " n_latents"],
        where: Bool[Tensor, "batch pos"],
    ) -> None:
        """Add a micro-batch; nothing waits for the device."""
        share = (where / where.sum(-1, keepdim=True))[..., None]  # each token's share of its example
        moved = torch.relu(signs * (latents - reference)).square()
        per_latent = (moved * share).sum((0, 1))
        for label, value in (
            (f"{target}+", per_latent[signs > 0].sum()),
            (f"{target}-", per_latent[signs < 0].sum()),
            (f"{target}/active", ((latents > 0) * share).sum((0, 1)).mean()),
        ):
            self._sum(label, value, len(where))

    @torch.no_grad()
    def add(self, label: str, values: Float[Tensor, " batch"]) -> None:
        """Add a micro-batch of one number per example."""
        self._sum(label, values.sum(), len(values))

    def _sum(self, label: str, value: Tensor, n: int) -> None:
        self.sums[label] = self.sums.get(label, 0) + value
        self.examples[label] = self.examples.get(label, 0) + n

    def take(self, name: str) -> dict[str, float]:
        """The means, under names that begin with the defence's; the sums start again."""
        means = {f"{name}/{label}": float(value) / self.examples[label] for label, value in self.sums.items()}
        self.sums, self.examples = {}, {}
        return means

    # -------------------------------------------------------------------------------------------- weight="auto"

    def weight(self, target: str) -> float:
        """Lambda as found so far."""
        return self.multipliers.get(target, 0.0) / self.bounds.get(target, 1.0)

    def ascend(self, target: str, penalty: float, dual_step: float) -> None:
        """Dual ascent on "penalty <= bound": the multiplier rises while the bound is exceeded, and falls while it is not."""
        excess = min(penalty / self.bounds[target] - 1, _LARGEST_STEP)
        self.multipliers[target] = max(0.0, self.multipliers.get(target, 0.0) + dual_step * excess)
        self.peaks[target] = max(self.peaks.get(target, 0.0), self.weight(target))

    def state(self) -> dict[str, float]:
        """The multipliers, and the peaks of lambda."""
        return {**self.multipliers, **{f"{target}{_PEAK}": peak for target, peak in self.peaks.items()}}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from such a state."""
        self.multipliers = {name: value for name, value in state.items() if not name.endswith(_PEAK)}
        self.peaks = {name.removesuffix(_PEAK): value for name, value in state.items() if name.endswith(_PEAK)}
