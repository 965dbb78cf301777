"""Do latents found on one narrow task block the misalignment that other tasks cause? (paper: figures 1, 6, 11, 19; frozen 14; larger 22)

    python experiments/transfer.py --preset organism --seeds 0 1 2
    python experiments/transfer.py --preset organism --seeds 0 1 2 --beside-kl

Latents are found on the preset's domain. Lambda is chosen there, on the core prompts, by EM + incoherence among the strengths that learn
the task, unless --strength says it; so is the weight of KL to base, with --beside-kl. The other domains are then fine-tuned plainly and
with these; their mean, with its SEM, leaves the source out.
Time on the organism, two cores, in `make reproduce`: seven minutes a seed, frozen two more.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import tyro

from blockem_tl import Run, Study, over_domains
from blockem_tl.study.options import StudyOptions
from blockem_tl.study.summary import short
from blockem_tl.views import studies

BY = ["domain", "run"]
MEANS = ["misaligned", "incoherent", "unsafe", "refusal", "adherent", "misaligned_reduction", "unsafe_reduction", "incoherent_difference",
         "adherent_reduction", "test_loss_change"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """strength: lambda; chosen by default.  to: domains; all others by default.  freeze_downstream: LoRA up to the site when blocking.
    beside_kl: also KL to base."""

    strength: float | None = None
    to: tuple[str, ...] = ()
    freeze_downstream: bool = False
    beside_kl: bool = False
    name: ClassVar[str] = "transfer"

    @property
    def variant(self) -> str:
        return "frozen" if self.freeze_downstream else ""


def chosen(study: Study, grid: list[Run]) -> Run:
    """The one to take, by the preset's own domain."""
    if len(grid) == 1:
        return grid[0]
    study.train(grid)
    return study.choose(grid, against=Run())


def main(options: Options) -> None:
    """Train and show all domains."""
    page = options.page()
    with options.study() as study:
        study.train([Run()])
        study.latents()
        source, preset = study.setting.domain, study.setting.preset
        lambdas = [weight for weight in preset.lambdas if weight] if options.strength is None else [options.strength]
        block = chosen(study, [Run(defence="block", strength=weight, latents="k") for weight in lambdas])
        place = study.setting.up_to_site if options.freeze_downstream else {}
        runs = [Run(), replace(block, overrides=place)]
        if options.beside_kl:
            runs.append(chosen(study, [Run(defence="kl", strength=weight) for weight in preset.kl_weights]))
        others = list(options.to) or [domain for domain in study.setting.inputs.domains if domain != source]
        everywhere = [replace(run, domain=domain) for run in runs for domain in ["", *others]]
        study.train(everywhere)
        arms = study.table(study.points(everywhere), against=Run(), by=BY)
    page.add("arms", arms, studies.side_by_side(arms.assign(arm=arms["domain"] + ": " + arms["run"]), label="arm"))
    if len(others) > 1:
        means = over_domains(arms.query("domain != @source"), [column for column in MEANS if column in arms])
        page.add("means", means, studies.side_by_side(means))
        page.add("table", short(means))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
