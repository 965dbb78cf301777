"""The defences that a `Run` names: from a setting, a run and its latent set to what `finetune` takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from blockem_tl.defences.blocking import Blocking
from blockem_tl.defences.caft import ConceptAblation
from blockem_tl.defences.directions import misaligned_direction, repair
from blockem_tl.defences.inoculation import Inoculation
from blockem_tl.defences.interleave import Interleaving
from blockem_tl.defences.kl import KLToBase
from blockem_tl.defences.ldifs import LDIFS
from blockem_tl.defences.preventative import PreventativeSteering
from blockem_tl.defences.safelora import SafeLoRA, alignment_differences
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.study.run import PLAIN, REPAIR, Point, Run
from blockem_tl.study.setting import Setting
from blockem_tl.training.defence import Defence
from blockem_tl.training.loss import mean_penalty

MakeDefences = Callable[[Setting, Run, LatentSet | None], Sequence[Defence]]
"""What a study takes as a defence of your own: ``Study(..., defences={"mine": function})``."""

PRICED = 64
"""Training rows on which a strength in nats is turned into a weight."""


def _needed(run: Run, latent_set: LatentSet | None) -> LatentSet:
    if latent_set is None:
        raise ValueError(f"run {run.label!r}: the defence {run.defence!r} acts on latents: name a set of the study, Run(latents=...)")
    return latent_set


def block(setting: Setting, run: Run, latent_set: LatentSet | None) -> list[Defence]:
    """BLOCK-EM; the strength is lambda."""
    return [Blocking(latent_set=_needed(run, latent_set), sae=setting.sae, weight=run.strength, **run.arguments)]


def kl(setting: Setting, run: Run, latent_set: LatentSet | None) -> list[Defence]:
    """KL to base; the strength is its weight."""
    return [KLToBase(weight=run.strength, **run.arguments)]


def ldifs(setting: Setting, run: Run, latent_set: LatentSet | None) -> list[Defence]:
    """LDIFS at every block's output; the strength is its weight."""
    sites = [f"blocks.{block}.hook_resid_post" for block in range(setting.model.cfg.n_layers)]
    return [LDIFS(**{"sites": sites, "weight": run.strength, **run.arguments})]


def caft(setting: Setting, run: Run, latent_set: LatentSet | None) -> list[Defence]:
    """CAFT; the strength is the number of latents whose directions are taken out."""
    return [ConceptAblation.of([_needed(run, latent_set).first(round(run.strength))], [setting.sae])]


def preventative(setting: Setting, run: Run, latent_set: LatentSet | None) -> list[Defence]:
    """Preventative steering along the best latent; the strength is the dose."""
    found = _needed(run, latent_set)
    direction = misaligned_direction(found, setting.sae)
    return [PreventativeSteering(site=found.site, direction=direction, dose=run.strength, scale=setting.scale())]


def interleaving(setting: Setting, run: Run, latent_set: LatentSet | None) -> list[Defence]:
    """Harmless rows of the preset's other domains; the strength is their share."""
    others = [domain for domain in setting.inputs.domains if domain != setting.domain]
    return [Interleaving(safe=[row for domain in others for row in setting.rows(domain, harmful=False)], share=run.strength)]


def inoculation(setting: Setting, run: Run, latent_set: LatentSet | None) -> list[Defence]:
    """Inoculation prompting with the run's ``prefix`` or ``system``; else the strength is the number of the preset's prefix, from 1."""
    prefixes = setting.preset.inoculations
    if not run.arguments and run.strength not in range(1, len(prefixes) + 1):
        raise ValueError(f"run {run.label!r}: expected as strength the number of one of the preset's {len(prefixes)} inoculations, from 1")
    return [Inoculation(**(run.arguments or {"prefix": prefixes[int(run.strength) - 1]}))]


def safelora(setting: Setting, run: Run, latent_set: LatentSet | None) -> list[Defence]:
    """SafeLoRA; the strength is its threshold, ``unaligned`` the folder or hub id of the model before its alignment (the preset's)."""
    source = run.arguments.get("unaligned") or setting.preset.unaligned
    if not source:
        raise ValueError(f"run {run.label!r}: preset {setting.preset.name!r} names no model before its alignment: say which is unaligned")
    before = AutoModelForCausalLM.from_pretrained(source, dtype=setting.model.cfg.dtype)
    return [SafeLoRA(differences=alignment_differences(setting.model.original_model, before), threshold=run.strength)]


DEFENCES: Mapping[str, MakeDefences] = {
    "block": block,
    "kl": kl,
    "ldifs": ldifs,
    "caft": caft,
    "preventative": preventative,
    "interleaving": interleaving,
    "inoculation": inoculation,
    "safelora": safelora,
}

ON_LATENTS = ("block", "caft", "preventative")
"""The defences that need a latent set."""


def condition_of(setting: Setting, point: Point) -> Condition:
    """What acts on the weights while they reply: nothing, but in a "repair" run, whose other arguments are those of `repair`."""
    run = point.run
    if run.defence != REPAIR:
        return UNSTEERED
    found = _needed(run, point.latents(setting.sae) if run.latents else None)
    return repair(found, setting.sae, dose=run.strength, scale=setting.scale(), **run.arguments)


def made(makers: Mapping[str, MakeDefences], setting: Setting, run: Run, latent_set: LatentSet | None, plain: Path | str) -> list[Any]:
    """The defences of a run; none for "plain". A strength in nats is turned into a weight by what plain's adapter costs."""
    if run.defence == PLAIN:
        return []
    if run.unit == "weight":
        return list(makers[run.defence](setting, run, latent_set))
    weighted = replace(run, unit="weight")
    found = list(makers[run.defence](setting, weighted, latent_set))
    weight = getattr(found[0], "weight", None) if len(found) == 1 else None
    several = isinstance(weight, list | tuple)
    if weight != run.strength and not several:
        raise ValueError(f"run {run.label!r}: a strength in nats needs a defence of one penalty, got {[one.name for one in found]}")
    price = mean_penalty(setting.model, found[0], setting.rows()[:PRICED], adapter=plain, batch_size=16)
    price /= run.strength if several else 1.0  # one weight for each of several sites is in it already
    return list(makers[run.defence](setting, replace(weighted, strength=run.strength / price), latent_set))
