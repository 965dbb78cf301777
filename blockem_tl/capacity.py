"""Residual steering capacity: how much the latents found in a re-emerged model can still do, against those that were blocked (F.2)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from blockem_tl.discovery import Discovery
from blockem_tl.latents import LatentSet

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
