"""Acting on re-emergence: rounds of blocking, training and extending K, and the residual steering capacity (paper, section 5 and F.2)."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np
import pandas as pd

from blockem_tl.discovery.config import FinalScore
from blockem_tl.discovery.pipeline import Discovery
from blockem_tl.saes.latent_set import LatentSet, NoLatents
from blockem_tl.views.results import Result

Checkpoint = TypeVar("Checkpoint")


# ------------------------------------------------------------------------------------------------ rounds


@dataclass(frozen=True, kw_only=True)
class Round(Generic[Checkpoint]):
    """One round: the blocked set, the trained model (a folder, an adapter's name), and its EM as a fraction."""

    latent_set: LatentSet
    checkpoint: Checkpoint
    em: float


def extension_rounds(
    latent_set: LatentSet,
    *,
    train: Callable[[LatentSet], Checkpoint],
    measure: Callable[[Checkpoint], float],
    extend: Callable[[LatentSet, Checkpoint], LatentSet],
    max_latents: int,
    enough: float = 0.0,
) -> Iterator[Round[Checkpoint]]:
    """Yield rounds as they are measured: block, train, measure EM, extend the set by what the result uses, train again from the start.

    It ends when EM stays down, when ``max_latents`` are blocked, or when nothing more is found. The last round is the result.

    Args:
        train: from a latent set to whatever stands for the trained model: a folder, an adapter's name.
        measure: EM of that model, as a fraction, on prompts that may choose (it decides when to stop, so they must not report).
        extend: from the set and the model to a larger set that begins with it, for instance
            ``discover(..., extending=latent_set).latent_set``. It is cut to the first ``max_latents``.
        max_latents: how many may be blocked in all.
        enough: EM up to which it counts as down.

    Raises:
        ValueError: ``max_latents`` below the set's size, ``enough`` outside [0, 1), an EM that is no fraction, or another set extended.
    """
    if max_latents < len(latent_set) or not 0 <= enough < 1:
        raise ValueError(
            f"rounds: expected max_latents >= {len(latent_set)} (the set's size) and 0 <= enough < 1, got {max_latents} and {enough}"
        )
    while True:
        checkpoint = train(latent_set)
        em = measure(checkpoint)
        if math.isnan(em) or not 0 <= em <= 1:
            raise ValueError(f"rounds: expected measure() to give a fraction of misaligned replies, got {em}")
        yield Round(latent_set=latent_set, checkpoint=checkpoint, em=em)
        if em <= enough or len(latent_set) == max_latents:
            return
        try:
            larger = extend(latent_set, checkpoint)
        except NoLatents:
            return
        if larger.latents[: len(latent_set)] != latent_set.latents:
            raise ValueError("rounds: expected extend() to keep the set's latents and add to their end, got another set")
        if len(larger) == len(latent_set):
            return
        latent_set = larger.first(min(max_latents, len(larger)))


@dataclass(frozen=True, kw_only=True, repr=False)
class Capacity(Result):
    """The steering-capacity ratio: mean score of K_reem over mean score of K.

    original, reemerged: those means, as differences of misaligned fractions, over n_original and n_reemerged latents.
    final_score: "both" (eq. 9: induction on base plus repair of the tuned model) or "repair" (the latter alone).
    differs: names of settings in which the two measurements differ besides the tuned model, as far as the sets know: judge, prompts,
        scale, fields of the discovery's configuration. The paper's ratio has none.
    """

    ratio: float
    original: float
    reemerged: float
    n_original: int
    n_reemerged: int
    final_score: FinalScore
    differs: tuple[str, ...]

    def headline(self) -> str:
        """The ratio and its two means."""
        other = f"; measured with other {', '.join(self.differs)}" if self.differs else ""
        return f"ratio {self.ratio:.2f}: {self.reemerged:.3f} over {self.original:.3f}, score {self.final_score!r}{other}"

    def to_frame(self) -> pd.DataFrame:
        """One row per set: mean score and number of latents."""
        rows = [("K", self.original, self.n_original), ("K_reem", self.reemerged, self.n_reemerged)]
        return pd.DataFrame(rows, columns=["latent_set", "mean_score", "n_latents"])

    def plot(self) -> Any:
        """A bar per set."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.bars(self.to_frame(), x="latent_set", y="mean_score", title=f"steering capacity, ratio {self.ratio:.2f}")


def capacity_ratio(original: LatentSet | Discovery, reemerged: LatentSet | Discovery, *, final_score: FinalScore | None = None) -> Capacity:
    """The steering-capacity ratio mean score(K_reem) / mean score(K); about 0.6 in the paper, with eq. 9 and 20 latents each.

    A score is the change in the fraction of misaligned replies to the core prompts under steering along one latent, at its largest doses
    within the limit on incoherence. Induction is always measured on base. Repair is measured on the model that the set was found in: K's on
    the unblocked fine-tune, K_reem's on the re-emerged one, each against its own unsteered rate, so a re-emerged model that is less
    misaligned has less to repair. A score also depends on judge, prompts, scale and grids; ``differs`` names those that were not the same.

    Args:
        original, reemerged: K and K_reem. A latent set keeps the scores that it was chosen by; a `Discovery` knows both kinds, and counts
            what it added.
        final_score: the kind of score; None takes the latent sets' own, and eq. 9 for two discoveries.

    Raises:
        ValueError: sets of different SAEs or sites; different kinds of scores, or sets that name none (random controls, sets made by
            hand); scores that were not measured; or a K whose mean score is not positive, so that there is no ratio.
    """
    sets = [source.added if isinstance(source, Discovery) else source for source in (original, reemerged)]
    if sets[0].sae_fingerprint != sets[1].sae_fingerprint or sets[0].site != sets[1].site:
        raise ValueError(
            f"capacity: expected two sets of one SAE, got SAEs at {sets[0].site} and {sets[1].site} with fingerprints "
            f"{sets[0].sae_fingerprint[:12]} and {sets[1].sae_fingerprint[:12]}: run discovery again with the SAE of the other"
        )
    chosen = _one_kind([_kind_of(s) for s in (original, reemerged) if isinstance(s, LatentSet)], final_score)
    before, after = (np.array(_scores(source, chosen)) for source in (original, reemerged))
    if not np.isfinite([*before, *after]).all():
        raise ValueError("capacity: some scores were not measured (no dose within the limit on incoherence): leave these latents out")
    if before.mean() <= 0:
        raise ValueError(f"capacity: expected a K with a positive mean score, got {before.mean():.3g}: there is nothing to compare with")
    return Capacity(
        ratio=float(after.mean() / before.mean()),
        original=float(before.mean()),
        reemerged=float(after.mean()),
        n_original=len(before),
        n_reemerged=len(after),
        final_score=chosen,
        differs=_differing(*sets),
    )


def _scores(source: LatentSet | Discovery, final_score: FinalScore) -> Sequence[float]:
    if isinstance(source, LatentSet):
        return source.scores
    return [c.score(final_score) for c in source.calibrated if c.candidate.latent in source.added.latents]


def _kind_of(latents: LatentSet) -> FinalScore:
    kinds = {part.get("config", {}).get("final_score") for part in _origins(latents.provenance)}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"capacity: expected a latent set whose provenance names the kind of its scores (config.final_score), got {kinds}: take a set "
            "from discover(), or pass the Discovery itself"
        )
    return kinds.pop()


def _one_kind(found: Sequence[FinalScore], asked: FinalScore | None) -> FinalScore:
    kinds = {*found, *([asked] if asked else [])}
    if len(kinds) > 1:
        raise ValueError(
            f"capacity: expected scores of one kind, got {sorted(kinds)}: eq. 9 adds induction and repair, eq. 10 is repair alone. Pass "
            "the Discovery instead of its latent set, which knows both"
        )
    return cast(FinalScore, kinds.pop()) if kinds else "both"


def _origins(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The provenance of each set that a union was made of."""
    return [origin for part in provenance["of"] for origin in _origins(part)] if "of" in provenance else [provenance]


def _differing(first: LatentSet, second: LatentSet) -> tuple[str, ...]:
    mine, yours = ({key for part in _origins(s.provenance) for key in _settings(part)} for s in (first, second))
    fields = {name for name, _ in mine ^ yours}
    return tuple(sorted(fields | ({"prompts"} if first.selection_prompts != second.selection_prompts else set())))


def _settings(part: dict[str, Any]) -> set[tuple[str, str]]:
    config = {key: value for key, value in part.get("config", {}).items() if key not in ("batch_size", "smallest_wave")}  # how, not what
    return {
        (key, json.dumps(value, default=str)) for key, value in {**config, "judge": part.get("judge"), "scale": part.get("scale")}.items()
    }
