"""Do latents found on one narrow task block the misalignment that other tasks cause? (paper: figures 1, 6, 11; frozen 14; larger sets 22)

    python experiments/transfer.py --preset organism --seeds 0 1 2

Latents are found on the preset's domain. Lambda is chosen there, on the core prompts, by EM + incoherence among the strengths that learn
the task, unless --strength says it. The other domains are then fine-tuned plainly and blocked; their mean, with its SEM, leaves the source
out.
"""

from dataclasses import dataclass
from typing import ClassVar

import tyro

from blockem_tl import Run, Study, over_domains
from blockem_tl.study.options import StudyOptions
from blockem_tl.views import studies

BY = ["domain", "run"]
MEANS = ["misaligned", "incoherent", "refusal", "adherent", "misaligned_reduction", "unsafe_reduction", "incoherent_difference",
         "adherent_reduction", "test_loss_change"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """strength: lambda; chosen by default.  to: domains; all others by default.  freeze_downstream: LoRA up to the site."""

    strength: float | None = None
    to: tuple[str, ...] = ()
    freeze_downstream: bool = False
    name: ClassVar[str] = "transfer"

    @property
    def variant(self) -> str:
        return "frozen" if self.freeze_downstream else ""


def strength(study: Study, options: Options) -> float:
    """Lambda of all domains."""
    if options.strength is not None:
        return options.strength
    grid = [Run(defence="block", strength=weight, latents="k") for weight in study.setting.preset.lambdas if weight]
    study.train(grid)
    return study.choose(grid, against=Run()).strength


def main(options: Options) -> None:
    """Train and show all domains."""
    page = options.page()
    with options.study() as study:
        study.train([Run()])
        study.latents()
        weight, source = strength(study, options), study.setting.domain
        others = list(options.to) or [domain for domain in study.setting.inputs.domains if domain != source]
        place = study.setting.up_to_site if options.freeze_downstream else {}
        plain = [Run(domain=domain) for domain in ["", *others]]
        blocked = [Run(defence="block", strength=weight, latents="k", domain=domain, overrides=place) for domain in ["", *others]]
        study.train([*plain, *blocked])
        arms = study.table(study.points([*plain, *blocked]), against=Run(), by=BY)
    page.add("arms", arms, studies.side_by_side(arms.assign(arm=arms["domain"] + ": " + arms["run"]), label="arm"))
    if len(others) > 1:
        means = over_domains(arms.query("domain != @source"), [column for column in MEANS if column in arms])
        page.add("means", means, studies.side_by_side(means))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
