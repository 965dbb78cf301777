"""Where the paper looks for latents (D.5): fine-tunes of five kinds, each with its own discovery; and the two rules that rank."""

from dataclasses import dataclass
from typing import Any

from blockem_tl.study.options import StudyOptions
from blockem_tl.study.reemergence import prolonged
from blockem_tl.study.run import Run
from blockem_tl.study.setting import Setting
from blockem_tl.study.study import Study

DEFAULT: dict[str, Any] = {"valid_only": False, "final_score": "both"}
"""Equation 9, unfiltered: options of `Study.latents`."""

VALIDREDUC: dict[str, Any] = {"valid_only": True, "final_score": "repair"}
"""The paper's main rule (D.4)."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions(StudyOptions):
    """Options of an experiment on several sources.

    other: the other task; the preset's first other one by default.  reem_strength: lambda of the run that comes back, the preset's
    smallest by default.  reem_epochs: of it.
    """

    other: str = ""
    reem_strength: float | None = None
    reem_epochs: float = 2.0

    def sources(self, setting: Setting) -> dict[str, tuple[Run, dict[str, Any]]]:
        """A fine-tune to look in and options of its discovery, by name; the set "k" has to be there before "reem" is trained.

        own: plain fine-tuning (the paper's Fin).  reem: long, and blocked on "k".  indpp: own, screened by induction alone.  other: plain,
        on another task (Health).  restricted: LoRA only up to the site (MaxLoRA20).

        Raises:
            ValueError: the preset has rows of one task.
        """
        others = [self.other] if self.other else [domain for domain in setting.inputs.domains if domain != setting.domain]
        if not others:
            raise ValueError(f"sources: preset {setting.preset.name!r} has rows of one task, expected another one for its latents")
        weight = min(weight for weight in setting.preset.lambdas if weight) if self.reem_strength is None else self.reem_strength
        long = prolonged(setting, self.reem_epochs)
        return {
            "own": (Run(), {}),
            "reem": (Run(defence="block", strength=weight, latents="k", overrides=long), {}),
            "indpp": (Run(), {"screen_score": "induction"}),
            "other": (Run(domain=others[0]), {}),
            "restricted": (Run(overrides=setting.up_to_site), {}),
        }

    def shortlists(self, study: Study) -> tuple[str, ...]:
        """Every source trained, and its shortlist found as a latent set of the study; their names, own and reem first."""
        found = self.sources(study.setting)
        study.train([Run()])
        study.latents()
        study.train([run for run, _ in found.values()])
        whole = {**DEFAULT, "n_latents": 2 * study.setting.preset.discovery.shortlist_size}
        for name, (run, changes) in found.items():
            study.latents(f"shortlist-{name}", of=run, **whole, **changes)
        return tuple(f"shortlist-{name}" for name in found)
