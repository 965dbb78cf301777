"""Does blocking further sites, at which plain fine-tuning's shift is there again, keep misalignment away? (left open by the paper)

    python experiments/blocking_sites.py --preset organism --strength 0.3 --seeds 0 1 2
    python experiments/blocking_sites.py --preset llama-3.1-8b --strength 3000 --other-sae llama_scope_lxr_8x --other-sae-id l{block}r_8x

A model is blocked at the preset's site for many epochs. The sites at whose outputs more of plain's shift is there than at the blocked one
(by --margin, on the core prompts, seeds together) are blocked as well, from base: with the latents that the blocked model uses there, and,
as a control, with as many random ones that fire there. The penalty grows with the square of activations, so lambda goes with the squared
ratio of the sites' scales. Every such site needs an SAE: --other-sae, --other-sae-id, in which {site} and {block} are filled in.
Time on the organism, two cores: two minutes a seed.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import tyro

from blockem_tl import Run, Study
from blockem_tl.analysis.rerouting.depth import returning_sites
from blockem_tl.models.activations import block_of
from blockem_tl.study import reemergence, sites
from blockem_tl.study.options import StudyOptions
from blockem_tl.views import plots, studies


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """strength: lambda, the preset's largest by default.  epochs: of training.  freeze_downstream: LoRA up to the site.  margin: a share of
    plain's shift.  other_sae, other_sae_id: of the SAEs at other sites; the preset's own release, by site, by default."""

    strength: float | None = None
    epochs: float = 4.0
    freeze_downstream: bool = False
    margin: float = 0.1
    other_sae: str = ""
    other_sae_id: str = "{site}"
    name: ClassVar[str] = "blocking_sites"


def sets_at(study: Study, blocked: Run, site: str, options: Options) -> dict[str, tuple[sites.Sae, str]]:
    """What is blocked at a site besides: the SAE there, and the name of the latent set."""
    name, sae_id = (part.format(site=site, block=block_of(site)) for part in (options.other_sae, options.other_sae_id))
    sae, names = (name or study.setting.preset.sae[0], sae_id or None), {kind: f"{kind} at {site}" for kind in ("found", "random")}
    study.latents(names["found"], sites.found, of=blocked, sae=sae)
    study.latents(names["random"], sites.at_random, of=blocked, sae=sae, beside=names["found"], firing=True)
    return {kind: (sae, name) for kind, name in names.items()}


def main(options: Options) -> None:
    """Block, see where the shift returns, block there too."""
    page = options.page()
    with options.study() as study:
        study.defences["sites"] = partial(sites.blocked, out=study.out)
        study.train([Run()])
        study.latents()
        long, weight = reemergence.prolonged(study.setting, options.epochs), options.strength or max(study.setting.preset.lambdas)
        over = {**long, **(study.setting.up_to_site if options.freeze_downstream else {})}
        plain = Run(overrides=long, name="plain")
        blocked = Run(defence="block", strength=weight, latents="k", overrides=over, name="blocked")
        study.train([plain, blocked])
        depth = study.step("depth-core", reemergence.depth, study.points([blocked]), beside=plain, split="core")
        page.add("depth", depth, plots.rerouting(depth))
        returning = returning_sites(depth, study.setting.site, margin=options.margin)
        sets, wider = [sets_at(study, blocked, site, options) for site in returning], list[Run]()
        for kind in ("found", "random") if sets else ():
            there = {**over, "sets": tuple(one[kind] for one in sets)}
            wider.append(replace(blocked, defence="sites", overrides=there, name=f"{kind} latents there too"))
        study.train(wider)
        arms = study.table(study.points([blocked, plain, *wider]), against=blocked)
    page.add("arms", arms.assign(also_at=", ".join(returning)), studies.side_by_side(arms))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
