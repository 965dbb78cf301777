"""Sites besides the preset's, each with an SAE of its own: latent sets and what they carry there, and blocking at several at once.

For `Study.latents`, `Study.step` and ``Study(defences={"sites": partial(sites.blocked, out=...)})``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from blockem_tl.defences.blocking import Blocking
from blockem_tl.evaluation.preference import sides
from blockem_tl.models.activations import block_of
from blockem_tl.models.lora import BASE
from blockem_tl.saes.fit import explained_variance
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.load import load_sae, site_of
from blockem_tl.study import controls, jobs, preferences
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.run import Point, Run
from blockem_tl.study.setting import Setting

Sae = tuple[str, str | None]
"""As for `load_sae`."""


class Place(NamedTuple):
    """An SAE, the block that its site is at, and a label, which also names latent sets."""

    sae: Sae
    block: int
    label: str


def named(saes: Sequence[str], sae_ids: Sequence[str] = ()) -> list[Sae]:
    """SAEs as a command line names them: releases with an id each, or folders without. Raises ValueError for another number of ids."""
    if sae_ids and len(sae_ids) != len(saes):
        raise ValueError(f"SAEs: expected no ids, or one for each of {len(saes)} SAEs, got {len(sae_ids)}")
    return list(zip(saes, sae_ids or [None] * len(saes), strict=True))


def places(saes: Sequence[Sae]) -> list[Place]:
    """Where SAEs are, from the first block to the last.

    Raises:
        ValueError: an SAE that cannot be loaded, is at no block, or would have another one's label.
    """
    found = []
    for sae in saes:
        site = site_of(load_sae(*sae))
        block = block_of(site)
        if block is None:
            raise ValueError(f"SAEs: expected sites at blocks, got {sae} at {site}")
        found.append(Place(sae, block, f"{Path(sae[1] or sae[0]).name} at block {block}"))
    if len({place.label for place in found}) < len(found):
        raise ValueError(f"SAEs: expected different names or blocks, got {[place.label for place in found]}")
    return sorted(found, key=lambda place: place.block)


def found(setting: Setting, point: Point, *, sae: Sae) -> LatentSet:
    """The latents that the preset's discovery finds there."""
    return jobs.find_latents(setting.elsewhere(*sae), point)


def attributed(setting: Setting, point: Point, *, sae: Sae, n: int) -> LatentSet:
    """The latents there that carry most of the shift: `preferences.attributed`."""
    return preferences.attributed(setting.elsewhere(*sae), point, n=n)


def at_random(setting: Setting, point: Point, *, sae: Sae, beside: str, firing: bool = False) -> LatentSet:
    """As many others there as the set ``beside`` has: `controls.random_beside`."""
    return controls.random_beside(setting.elsewhere(*sae), point, beside=beside, firing=firing)


def carried(setting: Setting, point: Point, *, sae: Sae, sets: list[str], split: PromptSplit) -> pd.DataFrame:
    """What latent sets there, all latents, the SAE's error and the residual stream carry of the shift, with the site and the shares of the
    variance of base's and of the point's states, on these pairs, that the SAE explains: `preferences.ceiling`."""
    there = setting.elsewhere(*sae)
    carries = preferences.ceiling(there, point, sets=sets, split=split)
    read = sides(there.pairs(split))
    fit = {name: explained_variance(there.model, there.sae, read, adapter=one) for name, one in (("base", BASE), ("tuned", point.adapter))}
    about: dict[str, Any] = {"site": there.site, "d_sae": there.sae.cfg.d_sae} | {f"explained_{name}": share for name, share in fit.items()}
    return carries.assign(**about)


def blocked(setting: Setting, run: Run, latent_set: LatentSet | None, *, out: Path) -> list[Blocking]:
    """Blocking (eq. 11, summed over sites) of the run's ``sets``, pairs of an SAE and the name of a set of the study in ``out``, and of its
    own latents if it has any; its other arguments are those of `Blocking`.

    The penalty grows with the square of activations, so lambda goes with the squared ratio of the sites' scales.

    Raises:
        ValueError: an SAE that does not fit the model, or a set that was made with another one.
    """
    targets = [(latent_set, setting.sae, run.strength)] if latent_set else []
    for sae, name in run.arguments["sets"]:
        other, path = setting.elsewhere(*sae), Point(run=run, seed=setting.seed, out=out).latents_file(name)
        targets.append((LatentSet.load(path, other.sae), other.sae, run.strength * (setting.scale() / other.scale()) ** 2))
    targets.sort(key=lambda target: block_of(target[0].site) or 0)
    others = {name: value for name, value in run.arguments.items() if name != "sets"}
    return [Blocking(targets=[(one, sae) for one, sae, _ in targets], weight=[weight for *_, weight in targets], **others)]
