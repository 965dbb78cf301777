"""Acting on re-emergence: find the latents that a re-emerged model uses besides K, block them too, and again (paper, section 5 and F.2)."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import numpy as np
from sae_lens import SAE

from blockem_tl.discovery.config import PAPER, DiscoveryConfig
from blockem_tl.discovery.pipeline import Discovery, discover
from blockem_tl.generation.engine import Engine
from blockem_tl.models.load import Model
from blockem_tl.saes.latent_set import LatentSet, NoLatents
from blockem_tl.types import Judge, Prompt

Checkpoint = TypeVar("Checkpoint")


@dataclass(frozen=True, kw_only=True)
class Extension:
    """latent_set: K and then what was added, each latent with its own sign, shift and score.  added: the new latents alone (K_reem).

    A score is an effect on the model that its latent was found in: K's on the first fine-tune, K_reem's on the re-emerged one. The
    provenance keeps one entry per source under "of", with the latents that came from it.
    """

    latent_set: LatentSet
    added: LatentSet
    discovery: Discovery


def extend(
    latent_set: LatentSet,
    model: Model,
    sae: SAE[Any],
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    scale: float,
    config: DiscoveryConfig = PAPER,
    provenance: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    adapter: str | None = None,
    store: Path | str | None = None,
    progress: bool = True,
) -> Extension:
    """Run discovery against ``model`` as it stands (the re-emerged checkpoint), with ``latent_set`` kept out of the candidates.

    Args:
        prompts: the core prompts; the union remembers them beside those that chose ``latent_set``.
        config: of the discovery; ``config.n_latents`` is how many are added at most.
        scale, provenance, engine, adapter, store, progress: as for `discover`.

    Raises:
        ValueError: a set of another SAE, or what `discover` refuses.
        NoLatents: no further latent qualifies.
    """
    latent_set.check_sae(sae)
    found = discover(
        model,
        sae,
        judge,
        prompts,
        scale=scale,
        config=config,
        exclude=latent_set.latents,
        provenance=provenance,
        engine=engine,
        adapter=adapter,
        store=store,
        progress=progress,
    )
    return Extension(latent_set=joined(latent_set, found.latent_set), added=found.latent_set, discovery=found)


def joined(first: LatentSet, second: LatentSet) -> LatentSet:
    """Their union, whose provenance says which latents came from where."""
    sources = [source for part in (first, second) for source in _sources(part)]
    return replace(
        first.union(second), provenance={"method": "extension", "of": sources, "neuronpedia": first.provenance.get("neuronpedia")}
    )


def _sources(latent_set: LatentSet) -> list[dict[str, Any]]:
    if latent_set.provenance.get("method") == "extension":
        return [{**source, "latents": [k for k in source["latents"] if k in latent_set.latents]} for source in latent_set.provenance["of"]]
    return [{**latent_set.provenance, "latents": list(latent_set.latents)}]


# ------------------------------------------------------------------------------------------------ rounds


@dataclass(frozen=True, kw_only=True)
class Round(Generic[Checkpoint]):
    """What was blocked, what training with it ended in, and how much EM (a fraction) was there."""

    latent_set: LatentSet
    checkpoint: Checkpoint
    em: float


def extension_rounds(
    latent_set: LatentSet,
    *,
    train: Callable[[LatentSet], Checkpoint],
    measure: Callable[[Checkpoint], float],
    extend: Callable[[LatentSet, Checkpoint], LatentSet],
    budget: int,
    enough: float = 0.0,
) -> Iterator[Round[Checkpoint]]:
    """Block, train, measure; extend the set by what the result uses; train again from the start. Yields each round once it is measured.

    It ends when EM stays down, when ``budget`` latents are blocked, or when nothing more is found. The last round is the result.

    Args:
        train: from a latent set to whatever stands for the trained model: a folder, an adapter's name.
        measure: EM of that model, as a fraction, on prompts that may choose (it decides when to stop, so they must not report).
        extend: from the set and the model to a larger set that begins with it, see `extend`. Of its latents the first that fit
            into the budget are taken.
        budget: how many latents may be blocked in all.
        enough: EM up to which it counts as down.

    Raises:
        ValueError: a budget below the set's size, ``enough`` outside [0, 1), an EM that is no fraction, or an extended set that does
            not begin with the set it extends.
    """
    if budget < len(latent_set) or not 0 <= enough < 1:
        raise ValueError(f"rounds: expected a budget of at least {len(latent_set)} latents and 0 <= enough < 1, got {budget} and {enough}")
    while True:
        checkpoint = train(latent_set)
        em = measure(checkpoint)
        if math.isnan(em) or not 0 <= em <= 1:
            raise ValueError(f"rounds: expected measure() to give a fraction of misaligned replies, got {em}")
        yield Round(latent_set=latent_set, checkpoint=checkpoint, em=em)
        if em <= enough or len(latent_set) == budget:
            return
        try:
            larger = extend(latent_set, checkpoint)
        except NoLatents:
            return
        if larger.latents[: len(latent_set)] != latent_set.latents:
            raise ValueError("rounds: expected extend() to keep the set's latents and add to their end, got another set")
        if len(larger) == len(latent_set):
            return
        latent_set = larger.first(min(budget, len(larger)))


Rule = Literal["both", "repair"]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """ratio: mean score of K_reem over mean score of K.

    original, reemerged: those means, as differences of misaligned fractions, and n_original, n_reemerged latents in them.
    rule: "both" (eq. 9: what the latent induces in base plus what it repairs in the tuned model) or "repair" (the latter alone).
    differs: in what the two measurements differ besides the tuned model, as far as the sets know: judge, prompts, scale or fields of the
    discovery's configuration. Empty is what the paper's ratio means.
    """

    ratio: float
    original: float
    reemerged: float
    n_original: int
    n_reemerged: int
    rule: Rule
    differs: tuple[str, ...]


def capacity_ratio(original: LatentSet | Discovery, reemerged: LatentSet | Discovery, *, rule: Rule | None = None) -> Capacity:
    """The steering-capacity ratio mean score(K_reem) / mean score(K); about 0.6 in the paper, with eq. 9 and 20 latents each.

    A score says what steering along one latent, at its largest doses within the incoherence budget, changes in the fraction of misaligned
    replies to the core prompts. Induction is always measured on base. Repair is measured on the model that the set was found in: K's on
    the unblocked fine-tune, K_reem's on the re-emerged one, each against its own unsteered rate, so a re-emerged model that is less
    misaligned has less to repair. A score also depends on judge, prompts, scale and grids; ``differs`` names those that were not the same.

    Args:
        original, reemerged: K and K_reem. A latent set keeps scores under the rule that it was chosen by; a `Discovery` knows both rules.
        rule: None takes the latent sets' own, and eq. 9 for two discoveries.

    Raises:
        ValueError: sets of different SAEs or sites; different rules, or sets that name none (random controls, sets made by hand); scores
            that were not measured; or a K whose mean score is not positive, so that there is no ratio.
    """
    sets = [source.latent_set if isinstance(source, Discovery) else source for source in (original, reemerged)]
    if sets[0].sae_fingerprint != sets[1].sae_fingerprint or sets[0].site != sets[1].site:
        raise ValueError(
            f"capacity: expected two sets of one SAE, got SAEs at {sets[0].site} and {sets[1].site} with fingerprints "
            f"{sets[0].sae_fingerprint[:12]} and {sets[1].sae_fingerprint[:12]}: run discovery again with the SAE of the other"
        )
    chosen = _one_rule([_rule_of(s) for s in (original, reemerged) if isinstance(s, LatentSet)], rule)
    before, after = (np.array(_scores(source, chosen)) for source in (original, reemerged))
    if not np.isfinite([*before, *after]).all():
        raise ValueError("capacity: some scores were not measured (no dose within the budget): leave these latents out")
    if before.mean() <= 0:
        raise ValueError(f"capacity: expected a K with a positive mean score, got {before.mean():.3g}: there is nothing to compare with")
    return Capacity(
        ratio=float(after.mean() / before.mean()),
        original=float(before.mean()),
        reemerged=float(after.mean()),
        n_original=len(before),
        n_reemerged=len(after),
        rule=chosen,
        differs=_differing(*sets),
    )


def _scores(source: LatentSet | Discovery, rule: Rule) -> Sequence[float]:
    if isinstance(source, LatentSet):
        return source.scores
    return [c.score(rule) for c in source.calibrated if c.candidate.latent in source.latent_set.latents]


def _rule_of(latents: LatentSet) -> Rule:
    rules = {part.get("config", {}).get("rule") for part in _origins(latents.provenance)}
    if len(rules) != 1 or None in rules:
        raise ValueError(
            f"capacity: expected a latent set whose provenance names the rule of its scores (config.rule), got {rules}: take a set from "
            "discover(), or pass the Discovery itself"
        )
    return rules.pop()


def _one_rule(found: Sequence[Rule], asked: Rule | None) -> Rule:
    rules = {*found, *([asked] if asked else [])}
    if len(rules) > 1:
        raise ValueError(
            f"capacity: expected scores under one rule, got {sorted(rules)}: eq. 9 adds induction and repair, eq. 10 is repair alone. Pass "
            "the Discovery instead of its latent set, which knows both"
        )
    return cast(Rule, rules.pop()) if rules else "both"


def _origins(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The provenance of each set that a union was made of."""
    return [origin for part in provenance["of"] for origin in _origins(part)] if "of" in provenance else [provenance]


def _differing(first: LatentSet, second: LatentSet) -> tuple[str, ...]:
    mine, yours = ({key for part in _origins(s.provenance) for key in _settings(part)} for s in (first, second))
    fields = {name for name, _ in mine ^ yours}
    return tuple(sorted(fields | ({"prompts"} if first.selection_prompts != second.selection_prompts else set())))


def _settings(part: dict[str, Any]) -> set[tuple[str, str]]:
    config = {key: value for key, value in part.get("config", {}).items() if key != "batch_size"}  # how, not what
    return {
        (key, json.dumps(value, default=str)) for key, value in {**config, "judge": part.get("judge"), "scale": part.get("scale")}.items()
    }
