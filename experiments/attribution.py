"""Do gradients say what patching would do, site by site and latent by latent? (no figure of the paper)

    python experiments/attribution.py --preset organism --seeds 0 1 2
    python experiments/attribution.py --preset organism --epochs 4 --strength 1 --freeze-downstream

Attribution patching as a first pass: estimates for the stream, attention and MLP of every block, and for all latents of the SAE, over the
prompt's or the reply's positions, and the real effect of the largest ones. The metric is how much likelier the tuned model's replies to
the final prompts are than base's, in nats per token. By default of the plain fine-tune; with --strength also of a blocked one.
Time on the organism, two cores, in `make reproduce`: five minutes a seed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import tyro

from blockem_tl import Point, Run, Setting, generate
from blockem_tl.analysis.patching.attribution import Positions, attribute_latents, attribute_sites
from blockem_tl.models.lora import BASE
from blockem_tl.study import reemergence
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.options import StudyOptions
from blockem_tl.study.patching import COMPONENTS
from blockem_tl.views import plots

POSITIONS: tuple[Positions, ...] = ("prompt", "reply")


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """strength: lambda of a blocked model.  epochs: of training, see reemergence.py; the preset's short training by default.
    freeze_downstream: train the blocked model with LoRA up to the site alone.  verify: how many candidates are really patched."""

    strength: float | None = None
    epochs: float | None = None
    freeze_downstream: bool = False
    verify: int = 20
    name: ClassVar[str] = "attribution"


def estimates(setting: Setting, point: Point, *, verify: int, split: PromptSplit = "final") -> pd.DataFrame:
    """One row per candidate that was really patched: candidates, positions, estimate, real; and of all of them metric and spearman."""
    model, asked = setting.model, {"max_new_tokens": setting.preset.max_new_tokens, "progress": False}
    tuned, base = (generate(model, setting.prompts(split), adapter=one, **asked) for one in (point.adapter, BASE))
    both = [(mine, theirs) for mine, theirs in zip(tuned, base, strict=True) if mine.reply and theirs.reply]
    sites, frames = [f"blocks.{block}.{kind}" for kind in COMPONENTS for block in range(model.cfg.n_layers)], []
    replies = [mine for mine, _ in both], [theirs for _, theirs in both]
    for positions in POSITIONS:
        options: dict[str, Any] = {"positions": positions, "verify": verify, "target": point.adapter, "progress": False}
        found = {
            "sites": attribute_sites(model, *replies, sites, **options),
            "latents": attribute_latents(model, *replies, setting.sae, **options),
        }
        for name, one in found.items():
            about = {"candidates": name, "positions": positions, "metric": one.metric, "spearman": one.rank_correlation}
            frames.append(one.frame.dropna(subset=["real"]).assign(**about))
    return pd.concat(frames, ignore_index=True)


def agreement(found: Any) -> pd.DataFrame:
    """Per model, kind of candidate, positions and seed: rank correlation, how many signs agree, the largest estimate beside the truth."""
    rows = []
    for key, one in found.groupby(["run", "candidates", "positions", "seed"], sort=False):
        top, same = one.loc[one["estimate"].abs().idxmax()], int((one["estimate"] * one["real"] > 0).sum())
        row = {"spearman": one["spearman"].iloc[0], "same_sign": same, "of": len(one), "metric": one["metric"].iloc[0]}
        about = dict(zip(("run", "candidates", "positions", "seed"), key, strict=True))
        rows.append({**about, **row, "largest_estimate": top["estimate"], "its_real_effect": top["real"]})
    return pd.DataFrame(rows)


def main(options: Options) -> None:
    """Train, estimate, verify."""
    page = options.page()
    with options.study() as study:
        study.train([Run()])
        long = {} if options.epochs is None else reemergence.prolonged(study.setting, options.epochs)
        runs = [Run(overrides=long, name="plain")]
        if options.strength is not None:
            study.latents()
            over = {**long, **(study.setting.up_to_site if options.freeze_downstream else {})}
            runs.append(Run(defence="block", strength=options.strength, latents="k", overrides=over, name="blocked"))
        study.train(runs)
        page.add("arms", study.table(study.points([Run(defence="base"), *runs]), against=runs[0]))
        found = study.step("attribution", estimates, study.points(runs), verify=options.verify)
    page.add("candidates", found, plots.attribution(found))
    page.add("agreement", agreement(found))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
