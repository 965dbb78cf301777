"""Which doses a model stays coherent at, from a few prompts: help in choosing the doses of stage 2 before anything is screened.

Doses do not carry over between models and SAEs (0.7 induces on Llama 3.1 8B, and makes most latents of a Qwen speak gibberish).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from sae_lens import SAE

from blockem_tl.data.checks import check_disjoint, check_prompts
from blockem_tl.discovery.config import FLAT, Budget
from blockem_tl.evaluation.evaluate import ask
from blockem_tl.evaluation.statistics import Rate
from blockem_tl.generation.replies import Speaker
from blockem_tl.generation.steering import UNSTEERED, Condition, Steering
from blockem_tl.saes.latents import decoder_directions
from blockem_tl.saes.load import site_of
from blockem_tl.types import Counts, Judge, Prompt

DOSES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5)


@dataclass(frozen=True, kw_only=True)
class DoseReport:
    """How coherent base and tuned stay at each dose, and the doses for stage 2 that follow, for a `DiscoveryConfig`.

    frame: one row per arm ("base", "tuned") and dose (0: unsteered): incoherent replies of n pooled over directions and signs, the rate
        with its 95 % Wilson interval, how many of the signed directions are within the budget, and of how many. Replies along one
        direction go together, so the true uncertainty is larger than the interval's.
    induce_dose, repair_dose: the largest dose up to which most directions stay within the budget, on base and on tuned.
    """

    frame: pd.DataFrame
    induce_dose: float
    repair_dose: float
    budget: Budget


def propose_doses(
    base: Speaker,
    tuned: Speaker,
    judge: Judge,
    prompts: Sequence[Prompt],
    sae: SAE[Any],
    *,
    scale: float,
    reporting: Sequence[Prompt],
    latents: Sequence[int] | None = None,
    n_latents: int = 8,
    n_prompts: int = 20,
    doses: Sequence[float] = DOSES,
    budget: Budget = FLAT,
    most: float = 0.5,
    seed: int = 0,
) -> DoseReport:
    """Steer base and tuned along some latents' directions, both ways, at every dose, and count the incoherent replies.

    Args:
        base, tuned: who speaks: `speakers`, or `EngineSpeaker`.
        prompts: core prompts; ``n_prompts`` of them are drawn.  reporting: the prompts that results are reported on; none may be asked.
        scale: the site's median norm s.
        latents: whose directions; None draws ``n_latents`` at random.  seed: of both draws.
        most: the share of signed directions that must be within the budget.

    Raises:
        ValueError: too few prompts, reporting prompts among them, bad doses, or a model that is incoherent at the smallest dose already.
    """
    check_prompts(prompts)
    check_disjoint(prompts, reporting)
    if len(prompts) < n_prompts or n_prompts < 1:
        raise ValueError(f"doses: expected at least n_prompts={n_prompts} prompts, got {len(prompts)}: pass more, or a smaller n_prompts")
    if not doses or min(doses) <= 0 or len(set(doses)) < len(doses) or not 0 < most <= 1:
        raise ValueError(f"doses: expected distinct positive doses and 0 < most <= 1, got {tuple(doses)} and {most}")
    draw = random.Random(seed)
    chosen = draw.sample(list(prompts), n_prompts)
    latents = draw.sample(range(sae.cfg.d_sae), n_latents) if latents is None else list(latents)
    rows, proposed = [], {}
    for arm, speak in (("base", base), ("tuned", tuned)):
        counted = _counts(speak, judge, chosen, _conditions(sae, latents, sorted(doses), scale))
        rows += [{"arm": arm, "dose": dose, **_row(counts, counted[0.0][0], budget)} for dose, counts in counted.items()]
        proposed[arm] = _largest(arm, rows, most)
    return DoseReport(frame=pd.DataFrame(rows), induce_dose=proposed["base"], repair_dose=proposed["tuned"], budget=budget)


def _conditions(sae: SAE[Any], latents: Sequence[int], doses: Sequence[float], scale: float) -> dict[float, list[Condition]]:
    """Every latent at plus and minus every dose; 0 is unsteered."""
    site, directions = site_of(sae), decoder_directions(sae, latents)
    conditions = {0.0: [UNSTEERED]}
    for dose in doses:
        conditions[dose] = [
            Condition(
                name=f"latent {latent} at {sign * dose:+g}",
                steering=(Steering(site=site, direction=direction, dose=sign * dose, scale=scale),),
            )
            for latent, direction in zip(latents, directions, strict=True)
            for sign in (1, -1)
        ]
    return conditions


def _counts(speak: Speaker, judge: Judge, prompts: Sequence[Prompt], conditions: dict[float, list[Condition]]) -> dict[float, list[Counts]]:
    """The counts of each condition, by dose; all in one batch."""
    everything = [condition for at_dose in conditions.values() for condition in at_dose]
    _, verdicts = ask(speak, judge, prompts, everything)
    n = len(prompts)
    counts = iter([Counts.of(verdicts[start : start + n]) for start in range(0, len(verdicts), n)])
    return {dose: [next(counts) for _ in at_dose] for dose, at_dose in conditions.items()}


def _row(counts: Sequence[Counts], unsteered: Counts, budget: Budget) -> dict[str, Any]:
    rate = Rate(k=sum(c.incoherent for c in counts), n=sum(c.n for c in counts))
    low, high = rate.interval
    within = sum(budget.allows(c, unsteered) for c in counts)
    return {"incoherent": rate.k, "n": rate.n, "rate": rate.value, "low": low, "high": high, "within": within, "of": len(counts)}


def _largest(arm: str, rows: Sequence[dict[str, Any]], most: float) -> float:
    """The largest dose up to which, at every dose, enough directions are within the budget."""
    largest = None
    steered = [row for row in rows if row["arm"] == arm and row["dose"] > 0]
    for row in steered:
        if row["within"] < most * row["of"]:
            break
        largest = row["dose"]
    if largest is None:
        first = steered[0]
        raise ValueError(
            f"doses: {arm} is incoherent at the smallest dose already: at {first['dose']:g} only {first['within']} of {first['of']} "
            f"directions are within the budget ({first['incoherent']} of {first['n']} replies incoherent). Try smaller doses, "
            "Budget(relative=True) where the judge calls many unsteered replies incoherent, and check the scale and the site"
        )
    return float(largest)
