"""Where is blocking a real model worth most: at which block, with which SAE, at one site or at several? (left open by the paper)

    blockem train-sae smollm2-135m saes/block10 --site blocks.10.hook_resid_post --adapters ADAPTER
    python experiments/real_sites.py --preset smollm2-135m --domain cars --saes saes/block10 saes/block20

The latents that carry most of plain fine-tuning's shift at each SAE's site are blocked, or as many random ones; then those of several
sites at once, at the same strength altogether. Training ends at the last of them (for all sites also after it), and stops where it knows
the task as plain does. Harm is the margin of the dev pairs, which choose and report nothing, so one seed will do; it needs no judge.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pandas as pd
import tyro

from blockem_tl import Run
from blockem_tl.study import preferences, sites
from blockem_tl.study.options import StudyOptions


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """saes, sae_ids: further SAEs, as `load_sae` takes them; no ids for folders.  nats: strength.  size: of each latent set.
    matched, longest: times plain's dev loss, and epochs, where an arm stops."""

    preset: str = "smollm2-135m"
    saes: tuple[str, ...] = ()
    sae_ids: tuple[str, ...] = ()
    nats: float = 135.0
    size: int = 600
    matched: float = 1.03
    longest: float = 1.6
    name: ClassVar[str] = "real_sites"


def blocked(options: Options, at: Sequence[sites.Place], kind: str = "", **over: Any) -> Run:
    """The latent sets of these places blocked at once, with LoRA up to the last of them."""
    sets = tuple((place.sae, place.label + kind) for place in at)
    usual = {"sets": sets, "epochs": options.longest, "positions": "all", "reference": "live", "up_to_block": at[-1].block}
    name = sites.joined(at) + kind + (", all blocks trained" if over else "")
    return Run(defence="sites", strength=options.nats, unit="nats", matched=options.matched, overrides=usual | over, name=name)


def arms(options: Options, found: Sequence[sites.Place]) -> Iterator[Run]:
    """Each place alone, beside random latents; several at once; and plain fine-tuning of the same blocks."""
    for place in found:
        yield blocked(options, [place])
        yield blocked(options, [place], ", random")
    yield from (blocked(options, many) for many in sites.several(found))
    own = sites.one_each(found)
    yield blocked(options, own, up_to_block=None)
    for until in (*(place.block for place in own), None):
        over = {"epochs": options.longest, "up_to_block": until}
        yield Run(matched=options.matched, overrides=over, name=f"plain, {'all blocks' if until is None else f'blocks to {until}'} trained")


def main(options: Options) -> None:
    """Find the sets and what they carry; block; compare on the dev pairs."""
    page, found, carried = options.page(), sites.places([options.chosen().sae, *sites.named(options.saes, options.sae_ids)]), list[Any]()
    with options.study() as study:
        study.defences["sites"] = partial(sites.blocked, out=study.out)
        study.train([Run()])
        for at in found:
            study.latents(at.label, sites.attributed, sae=at.sae, n=options.size)
            study.latents(f"{at.label}, random", sites.at_random, sae=at.sae, beside=at.label)
            sets = {at.label: "attributed", f"{at.label}, random": "random"}
            step = study.step(f"carried {at.label}", sites.carried, study.points([Run()]), sae=at.sae, sets=list(sets), split="dev")
            carried.append(step.replace({"taken_out": sets}).assign(sae=at.label))
        carries: Any = pd.concat(carried)
        page.add("saes", carries.groupby(["sae", "d_sae"], sort=False)[["explained_base", "explained_tuned"]].mean().reset_index())
        together = {sites.joined(many): [(at.sae, at.label) for at in many] for many in sites.several(found)}
        if together:
            step = study.step("carried together", sites.carried_together, study.points([Run()]), targets=together, split="dev")
            carries = pd.concat([carries, step.replace({"taken_out": {"latents": "attributed"}})])
        page.add("carried", preferences.carriers(carries, by=["sae"]))
        runs = list(arms(options, found))
        study.train(runs)
        points = study.points([Run(defence="base"), Run(), *runs])
        page.add("arms", preferences.table(study.preferences("dev", points), study.losses(points), against="plain"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
