"""Does misalignment come back under prolonged blocked training, and through what? (paper: figures 8, 28 to 30, 32)

    python experiments/reemergence.py --preset organism --seeds 0 1 2
    python experiments/reemergence.py --preset llama-3.1-8b --epochs 2 --strengths 3000 --judge-models qwen llama

Plain and blocked fine-tuning go on for many epochs, with LoRA on all blocks and with LoRA only up to the blocked site, and are looked at
again and again. Of each kind the run that comes back most is taken, by the core prompts alone (`reemerged`), and of each seed its worst
checkpoint: where the SAE still fits, what moved instead, and what training again from base does once the latents that it uses besides are
blocked as well, or as many random ones. patching_sweep.py patches, and capacity.py steers.
Time on the organism, two cores, in `make reproduce`: twelve minutes a seed.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
import tyro

from blockem_tl import Run, Study
from blockem_tl.study import reemergence
from blockem_tl.study.options import StudyOptions
from blockem_tl.views import plots, studies
from blockem_tl.views.tables import RateFrame


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """strengths: lambdas; the preset's by default.  frozen: those of runs with LoRA up to the site, 0 for none; none and the largest by
    default.  epochs: of training.  every: epochs between looks."""

    strengths: tuple[float, ...] = ()
    frozen: tuple[float, ...] | None = None
    epochs: float = 4.0
    every: float = 0.5
    name: ClassVar[str] = "reemergence"


def runs_of(options: Options, study: Study) -> list[list[Run]]:
    """Blocked runs (plain ones at 0) with LoRA on all blocks, and with LoRA up to the site; without those of which none is blocked."""
    preset, long = study.setting.preset, reemergence.prolonged(study.setting, options.epochs)
    strengths = options.strengths or tuple(weight for weight in preset.lambdas if weight)
    frozen = (0.0, max(strengths)) if options.frozen is None else options.frozen
    place = {**long, **study.setting.up_to_site}

    def run(weight: float, over: dict[str, Any], where: str) -> Run:
        name = ", ".join(part for part in (f"blocked, λ = {weight:g}" if weight else "plain", where) if part)
        return Run(defence="block", strength=weight, latents="k", overrides=over, name=name) if weight else Run(overrides=over, name=name)

    groups = [run(weight, long, "") for weight in strengths], [run(weight, place, "frozen downstream") for weight in frozen]
    return [group for group in groups if any(run.strength for run in group)]


def again(study: Study, run: Run, peaks: pd.DataFrame) -> list[Run]:
    """The run trained anew with K extended by what its worst checkpoints use, and by random latents."""
    mine, name = peaks[peaks["run"] == run.label].set_index("seed"), f"reem-{run.folder}"
    epochs, came_back = mine["epoch"].to_dict(), mine["epoch"][mine["worst"] > 0].to_dict()
    study.latents(name, reemergence.extended, of=run, k="k", epochs=came_back)
    study.latents(f"random-{name}", reemergence.extended_at_random, of=run, k="k", beside=name, epochs=epochs)
    found = {name: "K extended", f"random-{name}": "K extended at random"}
    return [replace(run, latents=latents, name=f"{run.name}, {what}") for latents, what in found.items()]


def main(options: Options) -> None:
    """Train for long, look, dissect what came back, and act on it."""
    page, epochs = options.page(), [options.every * (i + 1) for i in range(round(options.epochs / options.every))]
    with options.study() as study:
        study.train([Run()])
        study.latents()
        plain = Run(overrides=reemergence.prolonged(study.setting, options.epochs), name="plain")
        groups = runs_of(options, study)
        runs = [plain, *(run for group in groups for run in group)]
        study.train(runs, checkpoints_every=options.every)
        peaks = reemergence.peaks(study.replies("core", study.points(runs, epochs)))
        page.add("peaks", peaks)
        chosen = [reemergence.reemerged(peaks, [run for run in group if run.strength], against=plain) for group in groups]
        larger = {run: again(study, run, peaks) for run in chosen}
        runs += [run for more in larger.values() for run in more]
        study.train(runs, checkpoints_every=options.every)
        found = reemergence.curves(study, study.points(runs, epochs))
        losses = {"test_loss": "held-out SFT loss (nats per token)", "blocking_loss": "held-out blocking loss of K"}
        page.add("curves", found, studies.over_epochs(found, **losses))
        came_back = found["run"].isin([run.label for run in chosen])  # by the core prompts alone
        page.add("ends", RateFrame(found.assign(came_back_most=came_back).query("epoch == epoch.max()")))
        last = [study.table(study.points([run, *more], epochs[-1:]), against=run) for run, more in larger.items()]
        page.add("extended", RateFrame(pd.concat(last)))
        worst = [point for run in chosen for point in reemergence.worst(study.points([run]), peaks)]
        page.add("shares", study.step("shares", reemergence.shares, worst, beside=plain))
        depth = study.step("depth", reemergence.depth, worst, beside=plain)
        page.add("depth", depth, plots.rerouting(depth))
        read = [*study.points([Run(defence="base")]), *study.points([plain, *chosen], epochs)]
        fit = study.step("reconstruction", reemergence.reconstruction, read)
        page.add("reconstruction", fit, plots.reconstruction(fit.assign(arm=fit["run"])))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
