"""Sites besides the preset's, each with an SAE of its own: latent sets and what they carry there, and blocking at several at once.

For `Study.latents`, `Study.step` and ``Study(defences={"sites": partial(sites.blocked, out=...)})``.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from blockem_tl.analysis.joint_mediation import RESIDUAL, joint_mediation
from blockem_tl.defences.base_latents import Target
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
Targets = Sequence[tuple[Sae, str]]
"""SAEs, and for each the name of a latent set of the study."""


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


def one_each(found: Sequence[Place]) -> list[Place]:
    """The first SAE at each block."""
    blocks = {place.block: place for place in reversed(found)}
    return [blocks[block] for block in sorted(blocks)]


def several(found: Sequence[Place]) -> Iterator[tuple[Place, ...]]:
    """All of them, two blocks or more at a time."""
    own = one_each(found)
    return itertools.chain.from_iterable(itertools.combinations(own, n) for n in range(2, len(own) + 1))


def joined(at: Sequence[Place]) -> str:
    """The label of several places."""
    return " + ".join(place.label for place in at)


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


def carried_together(setting: Setting, point: Point, *, targets: Mapping[str, Targets], split: PromptSplit) -> pd.DataFrame:
    """What latent sets at several sites carry of the shift when all are taken out at once, and the residual stream at all of them, with
    the combination in the column "sae": `joint_mediation`."""
    if not preferences.harmed(setting, point, split):
        return preferences.NOTHING_MOVED.assign(sae="")
    loaded = {name: [_target(setting.elsewhere(*sae), point, one) for sae, one in some] for name, some in targets.items()}
    read = setting.model, loaded, setting.pairs(split), setting.held_out()[::2]
    roles: Any = [("reply",), ("prompt", "reply")]
    found = joint_mediation(*read, adapter=point.adapter, roles=roles, progress=False).to_frame()
    name, residual = found["taken_out"].str.removesuffix(RESIDUAL), found["taken_out"].str.endswith(RESIDUAL)
    return found.assign(sae=name, taken_out=residual.map({True: "residual", False: "latents"}))


def _target(there: Setting, point: Point, name: str) -> Target:
    """A set of the study, and the SAE that it is of."""
    return LatentSet.load(point.latents_file(name), there.sae), there.sae


def blocked(setting: Setting, run: Run, latent_set: LatentSet | None, *, out: Path) -> list[Blocking]:
    """Blocking (eq. 11, summed over sites) of the run's ``sets``, pairs of an SAE and the name of a set of the study in ``out``, and of its
    own latents if it has any; its other arguments are those of `Blocking`.

    The penalty grows with the square of activations, so lambda goes with the squared ratio of the sites' scales.

    Raises:
        ValueError: an SAE that does not fit the model, or a set that was made with another one.
    """
    targets = [(latent_set, setting.sae, run.strength)] if latent_set else []
    for sae, name in run.arguments["sets"]:
        other = setting.elsewhere(*sae)
        target = _target(other, Point(run=run, seed=setting.seed, out=out), name)
        targets.append((*target, run.strength * (setting.scale() / other.scale()) ** 2))
    targets.sort(key=lambda target: block_of(target[0].site) or 0)
    others = {name: value for name, value in run.arguments.items() if name != "sets"}
    return [Blocking(targets=[(one, sae) for one, sae, _ in targets], weight=[weight for *_, weight in targets], **others)]
