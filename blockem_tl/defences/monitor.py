"""Watching without blocking: how far a fine-tune has moved each latent from base in its misaligned direction, and an alarm."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor

from blockem_tl.data.chat import Batch, check_lengths, encode_examples
from blockem_tl.hooks import record
from blockem_tl.models.activations import base_activations, read_site
from blockem_tl.models.load import Model
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.latents import encode_latents
from blockem_tl.saes.load import check_fits
from blockem_tl.training.defence import NoPenalty
from blockem_tl.training.loss import check_examples
from blockem_tl.types import Example


@dataclass(frozen=True, kw_only=True)
class Movement:
    """One latent at one step. moved: mean over the step's completion tokens of sign * (z - z_base), in units of its spread on base."""

    step: int
    site: str
    latent: int
    sign: int
    moved: float


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A set that has moved beyond the threshold: the step, how far, and the latent that contributes most."""

    step: int
    site: str
    moved: float
    latent: int


def causal_weights(latent_set: LatentSet) -> Float[Tensor, " n_latents"]:
    """Each latent's weight in its set's movement: its score in discovery, as a share of all; equal shares if none is positive.

    A set also holds latents with little effect of their own (of style or topic), which harmless fine-tunes move as well.
    """
    scores = torch.tensor(latent_set.scores).clamp(min=0.0)
    return scores / scores.sum() if scores.sum() > 0 else torch.full_like(scores, 1 / len(scores))


@dataclass(kw_only=True, eq=False)
class Monitor(NoPenalty):
    """Watch how far latents move, and raise an alarm. It adds nothing to the loss; pass it to ``finetune(defences=[...])``.

    At every measured step the latents are read on the training batch as it is, under the tuned model and under base, on the same tokens.
    A latent's spread is its standard deviation over the completion tokens of ``rows`` under base, but never less than the median of its
    set's: a latent that is nearly silent on base would otherwise raise the alarm at its first flicker. A set's movement is the mean of
    its latents', weighted by their scores (`causal_weights`). A step is read before its update, so step 1 always reads 0. Each
    measured step costs a base forward up to the last site.

    Args:
        latent_sets, saes: in parallel, at most one per site.
        rows: ordinary rows, not the ones under suspicion (a few hundred are enough): they show what base is normally like.
        threshold: in spreads; a set that has moved further raises the alarm. By default none does, which is how it is
            calibrated, on a fine-tune known to be harmless.
        every: measure each so many steps.
        on_alarm: called once, when the alarm is raised. To end the run there: ``finetune(stop_when=monitor.stop_when)``.

    After (or during) the run: ``trajectory`` and ``to_frame()``, per latent and step; ``alarm``, the first one, or None; ``spreads``
    [n_latents], by site.

    Raises:
        ValueError: sets and SAEs that do not pair up, two sets at one site, a threshold or interval that is not positive, no rows,
            or no threshold where an alarm is waited for.
    """

    latent_sets: Sequence[LatentSet]
    saes: Sequence[SAE[Any]]
    rows: Sequence[Example]
    threshold: float = float("inf")
    every: int = 1
    on_alarm: Callable[[Alarm], None] | None = None
    name: str = "monitor"
    trajectory: list[Movement] = field(default_factory=list, init=False)
    alarm: Alarm | None = field(default=None, init=False)
    spreads: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.latent_sets or len(self.latent_sets) != len(self.saes):
            raise ValueError(f"monitor: expected latent sets and an SAE for each, got {len(self.latent_sets)} and {len(self.saes)}")
        if not self.threshold > 0 or self.every < 1:
            raise ValueError(f"monitor: expected a threshold > 0 and every >= 1, got {self.threshold} and {self.every}")
        if self.on_alarm is not None and self.threshold == float("inf"):
            raise ValueError("monitor: expected a threshold beside on_alarm, got none: no set would ever raise the alarm")
        if not self.rows:
            raise ValueError("monitor: expected rows to measure the latents' spread on, got none")
        for latent_set, sae in zip(self.latent_sets, self.saes, strict=True):
            latent_set.check_sae(sae)
        self._sites = [latent_set.site for latent_set in self.latent_sets]
        if len(set(self._sites)) < len(self._sites):
            raise ValueError(f"monitor: expected one latent set per site, got {self._sites}; take their union first")
        self._sums: dict[str, Tensor] = {}
        self._tokens = self._step = 0

    @torch.no_grad()
    def check(self, model: Model) -> None:
        """Measure the spreads on base and begin anew. Raises ValueError if an SAE does not fit, or no latent ever varies on the rows."""
        check_examples(model, self.rows)
        encoded = encode_examples(model.tokenizer, self.rows)
        check_lengths(encoded, model.cfg.n_ctx)
        for latent_set, sae in zip(self.latent_sets, self.saes, strict=True):
            check_fits(sae, model)
            with model.using("base"):
                read = read_site(model, latent_set.site, encoded)
                spread = torch.cat([encode_latents(sae, h, latent_set.latents)[batch.reply] for h, batch in read]).std(0)
            if not (spread > 0).any():
                raise ValueError(
                    f"monitor: none of {len(latent_set)} latents at {latent_set.site} varies on the rows under base: give other rows"
                )
            self.spreads[latent_set.site] = spread.clamp(min=float(spread[spread > 0].median()))
        self.trajectory.clear()
        self.alarm, self._sums, self._tokens, self._step = None, {}, 0, 0

    @contextmanager
    def during_step(self, model: Model, batch: Batch) -> Iterator[None]:
        """Read this micro-batch, if it is its step's turn; no penalty."""
        if self._step % self.every:
            yield None
            return
        reference = base_activations(model, batch, self._sites)
        store: dict[str, Tensor] = {}
        with model.hooks(fwd_hooks=[record(site, store) for site in self._sites]):
            yield None
        self._add(store, reference, batch.reply)

    @torch.no_grad()
    def _add(self, tuned: dict[str, Tensor], base: dict[str, Tensor], where: Bool[Tensor, "batch pos"]) -> None:
        for latent_set, sae in zip(self.latent_sets, self.saes, strict=True):
            z, reference = (encode_latents(sae, side[latent_set.site], latent_set.latents)[where].float() for side in (tuned, base))
            moved = torch.tensor(latent_set.signs, device=where.device) * (z - reference)
            self._sums[latent_set.site] = self._sums.get(latent_set.site, 0) + moved.sum(0)
        self._tokens += int(where.sum())

    def metrics(self) -> dict[str, float]:
        """Every set's movement in spreads, and whether the alarm has gone off; nothing for a step not measured. It closes the step."""
        self._step += 1
        if not self._tokens:
            return {}
        numbers: dict[str, float] = {}
        for latent_set in self.latent_sets:
            moved = (self._sums[latent_set.site] / self._tokens / self.spreads[latent_set.site]).cpu()
            for latent, sign, value in zip(latent_set.latents, latent_set.signs, moved.tolist(), strict=True):
                self.trajectory.append(Movement(step=self._step, site=latent_set.site, latent=latent, sign=sign, moved=value))
            parts = causal_weights(latent_set) * moved
            numbers[f"{self.name}/{latent_set.site}"] = float(parts.sum())
            self._raise_alarm(latent_set, parts)
        self._sums, self._tokens = {}, 0
        return {**numbers, f"{self.name}/alarm": float(self.alarm is not None)}

    def _raise_alarm(self, latent_set: LatentSet, parts: Float[Tensor, " n_latents"]) -> None:
        moved = float(parts.sum())
        if self.alarm is None and moved > self.threshold:
            self.alarm = Alarm(step=self._step, site=latent_set.site, moved=moved, latent=latent_set.latents[int(parts.argmax())])
            if self.on_alarm is not None:
                self.on_alarm(self.alarm)

    def stop_when(self, model: Model, step: int) -> bool:
        """Whether the alarm has gone off: ``finetune(stop_when=monitor.stop_when)``. Raises ValueError without a threshold."""
        if self.threshold == float("inf"):
            raise ValueError("monitor: expected a threshold to stop by, got none: no set would ever raise the alarm")
        return self.alarm is not None

    def to_frame(self) -> pd.DataFrame:
        """The trajectory: one row per measured step and latent, with columns step, site, latent, sign, moved."""
        return pd.DataFrame([asdict(movement) for movement in self.trajectory])
