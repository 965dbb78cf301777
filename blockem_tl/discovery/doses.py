"""The doses at which a model stays coherent, from a few prompts: help in choosing the doses of stage 2 before anything is screened.

Doses do not carry over between models and SAEs (0.7 induces on Llama 3.1 8B, and makes most latents of a Qwen reply_fn gibberish).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import SAE

from blockem_tl.data.checks import check_disjoint, check_prompts
from blockem_tl.discovery.config import FLAT, MaxIncoherence, warn_if_nothing_induced
from blockem_tl.evaluation.asking import ask
from blockem_tl.evaluation.statistics import Rate
from blockem_tl.generation.reply_fn import ReplyFn, replies_from
from blockem_tl.generation.steering import UNSTEERED, Condition, Steering
from blockem_tl.models.activations import median_norm
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.latents import decoder_directions
from blockem_tl.saes.load import check_fits, site_of
from blockem_tl.types import Counts, Judge, Prompt
from blockem_tl.views.results import Result

DOSES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5)


@dataclass(frozen=True, kw_only=True, repr=False)
class DoseReport(Result):
    """Coherence of base and tuned at each dose, and the doses for stage 2 that follow, for a `DiscoveryConfig`.

    frame: one row per arm ("base", "tuned") and dose (0: unsteered): incoherent replies of n pooled over directions and signs, the rate
        with its 95 % Wilson interval, how many of the signed directions are within the limit, and of how many, and the number of
        misaligned replies. Replies along one direction go together, so the true uncertainty is larger than the interval's.
    induce_dose, repair_dose: the largest dose up to which most directions stay within the limit, on base and on tuned.
    """

    frame: pd.DataFrame
    induce_dose: float
    repair_dose: float
    max_incoherence: MaxIncoherence

    def headline(self) -> str:
        """The proposed doses."""
        limit = f"{100 * self.max_incoherence.rate:g} %{' above unsteered' if self.max_incoherence.relative else ''}"
        return f"induce_dose={self.induce_dose:g}, repair_dose={self.repair_dose:g}, incoherence up to {limit}"

    def to_frame(self) -> pd.DataFrame:
        """``frame``."""
        return self.frame

    def plot(self) -> Any:
        """Incoherence against the dose, with the proposed doses."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.doses(self.frame, induce_dose=self.induce_dose, repair_dose=self.repair_dose)


def propose_doses(
    model: Model,
    sae: SAE[Any],
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    reporting: Sequence[Prompt],
    adapter: str | Path | None = None,
    scale: float | None = None,
    max_new_tokens: int = 200,
    batch_size: int | None = None,
    progress: bool = True,
    **options: Any,
) -> DoseReport:
    """Steer base and tuned along some latents' directions, both ways, at every dose, and count the incoherent replies.

    Args:
        prompts: core prompts; some of them are drawn.  reporting: the prompts that results are reported on; none may be asked.
        adapter: the tuned model: an adapter by name or in a folder; None: the one that acts.
        scale: the site's median norm on base; None measures it on ``prompts``.
        options: those of `doses_from`: latents, n_latents, n_prompts, doses, max_incoherence, min_share, seed.

    Raises:
        ValueError: a model without an adapter, too few prompts, reporting prompts among them, bad doses, or a model that is incoherent at
            the smallest dose already.
    """
    with model.holding(adapter) as held:
        name = held or model.active_adapter
        if name in (None, BASE):
            raise ValueError("doses: expected a model with an active adapter, got base: load one first, or pass adapter=...")
        base, tuned = (
            replies_from(model, adapter=which, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
            for which in (BASE, name)
        )
        found = median_norm(model, check_fits(sae, model), prompts) if scale is None else scale
        return doses_from(base, tuned, sae, judge, prompts, scale=found, reporting=reporting, **options)


def doses_from(
    base: ReplyFn,
    tuned: ReplyFn,
    sae: SAE[Any],
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    scale: float,
    reporting: Sequence[Prompt],
    latents: Sequence[int] | None = None,
    n_latents: int = 8,
    n_prompts: int = 20,
    doses: Sequence[float] = DOSES,
    max_incoherence: MaxIncoherence = FLAT,
    min_share: float = 0.5,
    seed: int = 0,
) -> DoseReport:
    """`propose_doses`, from reply functions.

    Args:
        latents: the latents along whose directions is steered; None draws ``n_latents`` at random.  seed: of both draws.
        n_prompts: how many prompts are drawn.
        min_share: the share of signed directions that must be within ``max_incoherence``.
    """
    check_prompts(prompts)
    check_disjoint(prompts, reporting)
    if len(prompts) < n_prompts or n_prompts < 1:
        raise ValueError(f"doses: expected at least n_prompts={n_prompts} prompts, got {len(prompts)}: pass more, or a smaller n_prompts")
    if not doses or min(doses) <= 0 or len(set(doses)) < len(doses) or not 0 < min_share <= 1:
        raise ValueError(f"doses: expected distinct positive doses and 0 < min_share <= 1, got {tuple(doses)} and {min_share}")
    draw = random.Random(seed)
    chosen = draw.sample(list(prompts), n_prompts)
    given, latents = latents, draw.sample(range(sae.cfg.d_sae), n_latents) if latents is None else list(latents)
    rows, proposed = [], {}
    for arm, reply_fn in (("base", base), ("tuned", tuned)):
        counted = _counts(reply_fn, judge, chosen, _conditions(sae, latents, sorted(doses), scale))
        rows += [{"arm": arm, "dose": dose, **_row(counts, counted[0.0][0], max_incoherence)} for dose, counts in counted.items()]
        proposed[arm] = _largest(arm, rows, min_share)
    if given is not None:  # latents drawn at random seldom induce anything, and need not
        induced = [row["misaligned"] / row["n"] - rows[0]["misaligned"] / rows[0]["n"] for row in rows if row["arm"] == "base"]
        warn_if_nothing_induced(induced, f"propose_doses: none of the {len(latents)} given latents", stacklevel=2)
    return DoseReport(
        frame=pd.DataFrame(rows), induce_dose=proposed["base"], repair_dose=proposed["tuned"], max_incoherence=max_incoherence
    )


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


def _counts(
    reply_fn: ReplyFn, judge: Judge, prompts: Sequence[Prompt], conditions: dict[float, list[Condition]]
) -> dict[float, list[Counts]]:
    """The counts of each condition, by dose; all in one batch."""
    everything = [condition for at_dose in conditions.values() for condition in at_dose]
    _, verdicts = ask(reply_fn, judge, prompts, everything)
    n = len(prompts)
    counts = iter([Counts.of(verdicts[start : start + n]) for start in range(0, len(verdicts), n)])
    return {dose: [next(counts) for _ in at_dose] for dose, at_dose in conditions.items()}


def _row(counts: Sequence[Counts], unsteered: Counts, max_incoherence: MaxIncoherence) -> dict[str, Any]:
    rate = Rate(k=sum(c.incoherent for c in counts), n=sum(c.n for c in counts))
    low, high = rate.interval
    within = sum(max_incoherence.allows(c, unsteered) for c in counts)
    row = {"incoherent": rate.k, "n": rate.n, "rate": rate.value, "low": low, "high": high, "within": within, "of": len(counts)}
    return row | {"misaligned": sum(c.misaligned for c in counts)}


def _largest(arm: str, rows: Sequence[dict[str, Any]], min_share: float) -> float:
    """The largest dose up to which, at every dose, enough directions are within the limit."""
    largest = None
    steered = [row for row in rows if row["arm"] == arm and row["dose"] > 0]
    for row in steered:
        if row["within"] < min_share * row["of"]:
            break
        largest = row["dose"]
    if largest is None:
        first = steered[0]
        raise ValueError(
            f"doses: {arm} is incoherent at the smallest dose already: at {first['dose']:g} only {first['within']} of {first['of']} "
            f"directions are within the limit ({first['incoherent']} of {first['n']} replies incoherent). Try smaller doses, "
            "MaxIncoherence(relative=True) if the judge calls many unsteered replies incoherent, and check the scale and the site"
        )
    return float(largest)
