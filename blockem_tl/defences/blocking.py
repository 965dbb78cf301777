"""BLOCK-EM: the one-sided, base-anchored penalty on chosen SAE latents (paper 3.2, A.5, eq. 11), at one site or several."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from blockem_tl.data.chat import Batch, Encoded, encode_examples, pad
from blockem_tl.defences._blocking_run import BlockingRun
from blockem_tl.defences._error_anchor import error_movement
from blockem_tl.defences.base_latents import (
    BaseLatents,
    Target,
    in_full_precision,
    read_latents,
    read_states,
    standard_deviations,
    stored_is_exact,
    stored_latents,
)
from blockem_tl.hooks import record
from blockem_tl.models.activations import block_of
from blockem_tl.models.load import Model
from blockem_tl.models.memory import in_batches
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.latents import encode_latents, norms
from blockem_tl.saes.load import check_fits
from blockem_tl.training.defence import PenaltyFn, Positions, acting_tokens, check_positions
from blockem_tl.training.loss import check_examples, loss_rows
from blockem_tl.types import Example


def one_sided_penalty(
    latents: Float[Tensor, "batch pos n_latents"],
    reference: Float[Tensor, "batch pos n_latents"],
    signs: Int[Tensor, " n_latents"],
    where: Bool[Tensor, "batch pos"],
) -> Float[Tensor, " batch"]:
    """L_block(x) per example: mean over the tokens in ``where`` of sum_k relu(sign_k * (z_tk - z_base_tk))^2 (eq. 11).

    Raises:
        ValueError: an example without a single token in ``where``.
    """
    counts = where.sum(-1)
    if (counts == 0).any():
        raise ValueError("blocking: expected at least one supervised token in every example; an empty completion has none")
    moved = torch.relu(signs.to(latents.dtype) * (latents - reference))
    return (moved.square().sum(-1) * where).sum(-1) / counts


@dataclass(frozen=True, kw_only=True)
class Blocking:
    """Keep the latents of one or several sets from moving, relative to the reference, in their misaligned direction.

    The residual stream is read at each site by a hook; the SAE is never spliced into the forward. The penalty is summed over the sites.

    Args:
        weight: lambda; or one per target; or "auto": found during the run, see ``max_movement``. With either of the latter the penalty that
            is reported as a whole is already weighted.
        latent_set, sae: the one target of most runs.
        targets: instead of those, several (latent set, SAE), from the first block to the last. For K+ alone, shuffled signs or a union
            at one SAE see `LatentSet`.
        positions: "completion" penalises the label-bearing tokens, as in the paper; "all" also the prompt (not template or padding).
        reference: "stored": base's latents, computed once for all rows of the run and kept for later runs (where rows round otherwise in
            other batches, the reference runs live, with a warning); "live": at every step, by a second forward with the adapter off; or
            `BaseLatents`, if an adapter's or another model's latents count as unmoved.
        max_movement: with "auto", how far the latents of each target may move in their misaligned direction (root mean square over latents
            and tokens), in units of their own standard deviation on the reference over the run's completion tokens.
        error_anchor: weight of the SAE's error beside the latents, relative to lambda: the squared change of what the SAE leaves out,
            |(h - SAE(h)) - (h - SAE(h))(base)|^2, a mean over the same tokens. Without it a change can escape through the error. The
            reference then runs at every step.
        dual_step: with "auto", how fast the weight is adapted: the rise of its multiplier in one step, in nats per multiple of the bound.

    Raises:
        ValueError: a weight or error_anchor that is negative or not finite, a max_movement or dual_step that is not positive, no target or
            both spellings, a latent set made with another SAE, targets out of order, one SAE twice.
    """

    weight: float | Sequence[float] | Literal["auto"]
    latent_set: LatentSet | None = None
    sae: SAE[Any] | None = None
    targets: Sequence[Target] = ()
    positions: Positions = "completion"
    reference: Literal["stored", "live"] | BaseLatents = "stored"
    max_movement: float = 0.1
    dual_step: float = 0.02
    error_anchor: float = 0.0
    name: str = "block"
    _run: BlockingRun = field(default_factory=BlockingRun, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.latent_set is None or self.sae is None) == (not self.targets) or (self.latent_set is None) != (self.sae is None):
            raise ValueError("blocking: expected either latent_set=... with sae=..., or targets=[(latent_set, sae), ...]")
        for latent_set, sae in self.all_targets:
            latent_set.check_sae(sae)
        if isinstance(self.weight, str) and self.weight != "auto":
            raise ValueError(f'blocking weight: expected numbers or "auto", got {self.weight!r}')
        for weight in self.weights:
            if not 0 <= weight < float("inf"):
                raise ValueError(f"blocking weight: expected a finite lambda >= 0, got {weight}")
        check_positions(self.positions)
        if not 0 <= self.error_anchor < float("inf"):
            raise ValueError(f"blocking error_anchor: expected a finite number >= 0, got {self.error_anchor}")
        if not (0 < self.max_movement < float("inf") and 0 < self.dual_step < float("inf")):
            raise ValueError(
                f"blocking: expected a finite max_movement > 0 and dual_step > 0, got {self.max_movement} and {self.dual_step}"
            )
        if self.reference not in ("stored", "live") and not isinstance(self.reference, BaseLatents):
            raise ValueError(
                f'blocking: expected reference="stored", "live" or BaseLatents(adapter_or_model=...), got {self.reference!r}; an adapter '
                "that counts as unmoved is named in BaseLatents"
            )
        if len(self.weights) != len(self.all_targets):
            raise ValueError(f"blocking: expected one weight, or one for each of {len(self.all_targets)} targets, got {len(self.weights)}")
        blocks = [block_of(latent_set.site) for latent_set, _ in self.all_targets]
        if None not in blocks and blocks != sorted(cast(list[int], blocks)):
            raise ValueError(f"blocking: expected targets from the first block to the last, got {[s.site for s, _ in self.all_targets]}")
        places = [(latent_set.site, latent_set.sae_fingerprint) for latent_set, _ in self.all_targets]
        if len(set(places)) < len(places):
            raise ValueError("blocking: two targets share one SAE, so shared latents would count twice: join the sets with union()")

    @property
    def all_targets(self) -> tuple[Target, ...]:
        """Every (latent set, SAE), however they were given."""
        return tuple(self.targets) or ((cast(LatentSet, self.latent_set), cast(SAE[Any], self.sae)),)

    @property
    def weights(self) -> tuple[float, ...]:
        """Lambda of each target; with "auto" as found so far."""
        if isinstance(self.weight, str):
            return tuple(self._run.weight(label) for label in self._labels)
        return tuple(self.weight) if isinstance(self.weight, Sequence) else (self.weight,) * len(self.all_targets)

    def check(self, model: Model) -> None:
        """Raise ValueError if an SAE does not fit ``model``."""
        for _, sae in self.all_targets:
            check_fits(sae, model)

    def prepare(self, model: Model, rows: Sequence[Encoded]) -> None:
        """Compute or open the stored reference of the rows to come.

        Raises:
            ValueError: a site that no trained tensor lies below, so that its penalty would have no gradient; or, with "auto", latents
                that never fire on the rows.
        """
        self._check_reached(model)
        self._run.start()
        if self._reference.stored:
            kept = stored_latents(model, self.all_targets, rows, self._reference)
            self._run.stored = kept if stored_is_exact(kept, model, self.all_targets, rows, self._reference) else None
        if self.weight == "auto":
            variances = standard_deviations(model, self.all_targets, rows, self._reference, self._run.stored).square()
            for label, part in zip(self._labels, variances.split([len(s) for s, _ in self.all_targets]), strict=True):
                self._run.bounds[label] = self.max_movement**2 * float(part.sum())
                if self._run.bounds[label] == 0:
                    raise ValueError(f'blocking at {label}: no latent ever fires on these rows, so "auto" has no unit: give a weight')

    @contextmanager
    def during_step(self, model: Model, batch: Batch) -> Iterator[PenaltyFn]:
        """Read the tuned model's latents at every site; yields the penalty."""
        where = acting_tokens(batch, self.positions)
        reference = self.reference_latents(model, batch)
        sites = list(dict.fromkeys(s.site for s, _ in self.all_targets))
        before = self._reference_states(model, batch, sites) if self.error_anchor else {}
        store: dict[str, Tensor] = {}
        with self._run.counting(), model.hooks(fwd_hooks=[record(site, store, detach=False) for site in sites]):
            yield lambda logits: self._penalty(store, reference, where, before)

    def _reference_states(self, model: Model, batch: Batch, sites: Sequence[str]) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        with self._reference.reference_model(model) as chosen:
            return read_states(chosen, sites, batch)

    def reference_latents(self, model: Model, batch: Batch) -> Float[Tensor, "batch pos n_latents"]:
        """z of the reference on the batch, all targets side by side: looked up if it is stored, else run now."""
        stored = self._run.stored.look_up(batch) if self._run.stored else None
        if stored is not None:
            return stored
        with self._reference.reference_model(model) as chosen:
            return read_latents(chosen, self.all_targets, batch)

    def metrics(self) -> dict[str, float]:
        """Per site and sign the penalty's mean over the step's examples (unweighted), and the share of (token, latent) that is active."""
        numbers = self._run.take(self.name)
        if self.weight == "auto":
            numbers |= {f"{self.name}/{label}/weight": weight for label, weight in zip(self._labels, self.weights, strict=True)}
        return numbers

    def adapt(self, numbers: Mapping[str, float]) -> None:
        """With "auto", raise the weight of each target whose penalty exceeds its bound, and lower the others."""
        for label in self._run.bounds:
            penalty = numbers[f"{self.name}/{label}+"] + numbers[f"{self.name}/{label}-"]
            self._run.ascend(label, penalty, self.dual_step)

    def state(self) -> dict[str, float]:
        """The multipliers by now, in nats (lambda times the bound), and the peaks of lambda."""
        return self._run.state()

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's state."""
        self._run.restore(state)

    def describe_weight(self) -> list[dict[str, Any]]:
        """Per target its weight and what that means: lambda carries over to another SAE only as far as the norms agree.

        rising: whether "auto" was still raising it in the last step.
        """
        return [
            {
                "site": label,
                "latents": len(latent_set),
                "weight": weight,
                "peak": max(weight, self._run.peaks.get(label, 0.0)),
                "rising": self.weight == "auto" and 0 < self._run.peaks.get(label, 0.0) <= weight,
                "sae_fingerprint": latent_set.sae_fingerprint,
                "sae_norms": norms(sae, latent_set.latents),
            }
            for label, (latent_set, sae), weight in zip(self._labels, self.all_targets, self.weights, strict=True)
        ]

    @property
    def _labels(self) -> list[str]:
        """Names of the targets in the log: the site, and a number for a second SAE there."""
        sites = [latent_set.site for latent_set, _ in self.all_targets]
        return [site if sites[:i].count(site) == 0 else f"{site}#{sites[:i].count(site) + 1}" for i, site in enumerate(sites)]

    @property
    def _reference(self) -> BaseLatents:
        return self.reference if isinstance(self.reference, BaseLatents) else BaseLatents(stored=self.reference == "stored")

    def _penalty(
        self,
        store: dict[str, Tensor],
        reference: Float[Tensor, "batch pos n_latents"],
        where: Bool[Tensor, "batch pos"],
        states: Mapping[str, Tensor],
    ) -> Float[Tensor, " batch"]:
        total = torch.zeros(len(where), device=where.device)
        sizes = [len(latent_set) for latent_set, _ in self.all_targets]
        shared = isinstance(self.weight, (int, float))
        targets = zip(self._labels, self.all_targets, self.weights, reference.split(sizes, dim=-1), strict=True)
        for label, (latent_set, sae), weight, before in targets:
            with in_full_precision(where.device):
                latents = encode_latents(sae, store[latent_set.site], latent_set.latents)
                signs = torch.tensor(latent_set.signs, device=where.device)
                penalty = one_sided_penalty(latents, before.to(latents.dtype), signs, where)
                if self.error_anchor:
                    moved = error_movement(sae, store[latent_set.site], states[latent_set.site], where)
                    self._run.add(f"{label}/error", moved)
                    penalty = penalty + self.error_anchor * moved
            total = total + (penalty if shared else weight * penalty)
            self._run.note(label, latents.detach(), before, signs, where)
        return total

    def _check_reached(self, model: Model) -> None:
        store: dict[str, Tensor] = {}
        tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        sites = {latent_set.site for latent_set, _ in self.all_targets}
        with torch.enable_grad(), model.hooks(fwd_hooks=[record(site, store, detach=False) for site in sites]):
            cast(Any, model.hf)(input_ids=tokens, use_cache=False)
        unreached = sorted(site for site in sites if not store[site].requires_grad)
        if unreached:
            raise ValueError(
                f"blocking at {unreached}: nothing that is trained lies below, so the penalty has no gradient: train blocks up to the site"
            )


@torch.no_grad()
def blocking_loss(
    model: Model, latent_set: LatentSet, sae: SAE[Any], examples: Sequence[Example], *, batch_size: int | None = None
) -> float:
    """L_block (eq. 11, unweighted) of the model as it stands, on any rows, against base; 0 for base itself.

    Any model can be measured so, also one that was trained without blocking: the trajectory over its checkpoints says whether the latents
    stayed put.

    Args:
        batch_size: rows per forward; None: 64, or what fits into memory.

    Raises:
        TypeError: rows that are no examples.
        ValueError: a set of another SAE, an SAE that does not fit, or a row with an empty completion.
    """
    check_examples(model, examples)
    latent_set.check_sae(sae)
    check_fits(sae, model)
    encoded, signs = encode_examples(model.tokenizer, examples), torch.tensor(latent_set.signs, device=model.device)

    def summed(rows: slice) -> float:
        batch = pad(encoded[rows], model.pad_id, side="right", device=model.device)
        with model.using("base"):
            before = read_latents(model, [(latent_set, sae)], batch)
        return float(one_sided_penalty(read_latents(model, [(latent_set, sae)], batch), before, signs, batch.reply).sum())

    return sum(in_batches(encoded, batch_size or loss_rows(model, encoded), summed)) / len(encoded)
