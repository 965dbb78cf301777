"""How strongly can a re-emerged model still be steered at the blocked site? The steering-capacity ratio. (paper: F.2; no figure)

    python experiments/capacity.py --preset organism --epochs 4 --freeze-downstream --seeds 0 1 2
    python experiments/capacity.py --preset llama-3.1-8b --epochs 2 --strength 3000 --judge-models qwen llama

K is found on the plain fine-tune; then a model is blocked with it for many epochs, and the same discovery runs against that one, K not left
out: K_reem. A latent's score is what steering along it induces in base plus what it repairs in the model that it was found in (eq. 9), each
at its largest dose within the limit on incoherence. The ratio is mean score(K_reem) / mean score(K), 0.6 in the paper. Scores are on the
core prompts, which also choose the latents: both are optimistic, and a model that is less misaligned has less to repair.
Time on the organism, two cores, in `make reproduce`: three minutes a seed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import tyro

from blockem_tl import Point, Run, Setting
from blockem_tl.evaluation.statistics import mean_over_domains
from blockem_tl.study import jobs, reemergence
from blockem_tl.study.options import StudyOptions
from blockem_tl.views import plots


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """strength: lambda, the preset's largest by default.  epochs: of the blocked training, at a constant rate.  freeze_downstream: LoRA up
    to the site."""

    strength: float | None = None
    epochs: float = 4.0
    freeze_downstream: bool = False
    name: ClassVar[str] = "capacity"


def scores(setting: Setting, point: Point) -> list[dict[str, Any]]:
    """The latents that discovery finds in the point's model, with both parts of their scores."""
    found = jobs.discovery(setting, point).to_frame().query("in_k")
    names = ["latent", "sign", "induction", "repair"]
    return found[names].assign(score=found["induction"] + found["repair"]).to_dict("records")


def ratios(found: pd.DataFrame, plain: str, blocked: str) -> pd.DataFrame:
    """One row per seed: both mean scores, their ratio, and how many latents are in both sets."""
    rows = []
    for seed, part in found.groupby("seed"):
        k, reem = (part[part["run"] == run] for run in (plain, blocked))
        row = {"seed": seed, "n_k": len(k), "n_reem": len(reem), "shared": len(set(k["latent"]) & set(reem["latent"]))}
        rows.append(row | {"score_k": k["score"].mean(), "score_reem": reem["score"].mean()})
    frame = pd.DataFrame(rows)
    return frame.assign(ratio=frame["score_reem"] / frame["score_k"])


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean ratio with its 95 % t interval."""
    mean, sem = mean_over_domains(frame["ratio"].tolist())
    return pd.DataFrame([{"seeds": len(frame), "ratio": mean.value, "ratio_low": mean.low, "ratio_high": mean.high, "ratio_sem": sem}])


def main(options: Options) -> None:
    """Find K, block it for long, find K_reem."""
    page, plain = options.page(), Run()
    with options.study() as study:
        config = study.setting.preset.discovery
        if config.final_score == "repair" and not config.valid_only:
            raise ValueError(
                f"capacity: the discovery of {options.preset!r} measures no induction, of which eq. 9 is made: take another preset"
            )
        study.train([plain])
        study.latents()
        weight = max(study.setting.preset.lambdas) if options.strength is None else options.strength
        place = study.setting.up_to_site if options.freeze_downstream else {}
        over = {**reemergence.prolonged(study.setting, options.epochs), **place}
        blocked = Run(defence="block", strength=weight, latents="k", overrides=over, name="blocked, re-emerged")
        study.train([blocked])
        page.add("arms", study.table(study.points([Run(defence="base"), plain, blocked]), against=plain))
        found = study.step("scores", scores, study.points([plain, blocked]))
    frame = ratios(found, plain.label, blocked.label)
    page.add("capacity", frame, plots.bars(frame.assign(seed=frame["seed"].map("seed {}".format)), x="seed", y="ratio"))
    if len(frame) > 1:
        page.add("mean", over_seeds(frame))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
