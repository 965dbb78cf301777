"""Does the shift come back when a blocked model is trained on, and from where? (figures 8, 28 to 32, by contrastive pairs)

    python experiments/real_reemergence.py --preset smollm2-135m --domain cars --epochs 6
    python experiments/real_reemergence.py --preset organism --epochs 4

Plain and blocked fine-tuning go on for many epochs, and so does blocking with K extended by the latents that carry what came back, or by as
many random ones. Tables: the shift at every epoch; at the end, what base's states do to it, patched in at every block's output, over the
question or over the answer; what carries it at the site: K, other latents, or what the SAE leaves out; and at which block plain's change is
there again. It needs no judge. Nothing is chosen here: the final pairs report, the core pairs find latents.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import tyro

from blockem_tl import Run, Study
from blockem_tl.study import preferences, reemergence
from blockem_tl.study.options import StudyOptions
from blockem_tl.views import plots, studies


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """epochs: of training.  every: epochs between looks.  size: of K.  nats: the strength.  error_anchor: of the SAE's error.  more: K is
    extended by so many latents, and what it carries is measured; 0: neither.  swept: final pairs that are patched at every block."""

    preset: str = "smollm2-135m"
    epochs: float = 6.0
    every: float = 1.0
    size: int = 600
    nats: float = 45.0
    error_anchor: float = 0.0
    more: int = 600
    swept: int = 60
    name: ClassVar[str] = "real_reemergence"


def extended(study: Study, blocked: Run, more: int) -> list[Run]:
    """The blocked run anew, with K extended by what it uses besides at its end, and by random latents."""
    name, k = f"{blocked.latents}-extended", blocked.latents
    study.latents(name, preferences.extended, of=blocked, k=k, n=more)
    study.latents(f"{name}-random", reemergence.extended_at_random, of=blocked, k=k, beside=name)
    found = {name: "K extended", f"{name}-random": "K extended at random"}
    return [replace(blocked, latents=latents, name=f"{blocked.name}, {what}") for latents, what in found.items()]


def main(options: Options) -> None:
    """Train, extend, follow, patch."""
    page, k, long = options.page(), "attributed", {"epochs": options.epochs}
    over: dict[str, Any] = {**long, "positions": "all", "reference": "live"}
    over |= {"error_anchor": options.error_anchor} if options.error_anchor else {}
    plain = Run(overrides=long, name="plain")
    blocked = Run(defence="block", strength=options.nats, unit="nats", latents=k, overrides=over, name="blocked")
    base = Run(defence="base")
    with options.study() as study:
        study.train([Run()])
        study.latents(k, preferences.attributed, n=options.size, spare=0.0)
        study.train([plain, blocked], checkpoints_every=options.every)
        again = extended(study, blocked, options.more) if options.more else []
        study.train(again, checkpoints_every=options.every)
        epochs = [options.every * (i + 1) for i in range(round(options.epochs / options.every))]
        points, ends = [*study.points([base]), *study.points([plain, blocked, *again], epochs)], study.points([plain, blocked])
        found, losses = study.preferences("final", points), study.losses(points)
        rows = preferences.along(found, losses, against="plain")
        page.add("epochs", rows, studies.shifts_along(rows, "epoch"))
        if again:
            last = found[found["epoch"].isin([epochs[-1]]) | (found["run"] == base.label)]
            page.add("lead", preferences.lead(last, again[0].label, against="plain"))
            page.add("carriers", preferences.carriers(study.step("carriers", preferences.ceiling, ends, sets=(k,))))
        swept = study.step("patched", preferences.patched, ends, split="final", n=options.swept)
        patched = preferences.left(swept, study.preferences("final", study.points([base])))
        page.add("patched", patched, studies.shifts_along(patched, "block", y="effect", panels="patched"))
        back: dict[str, Any] = {"beside": plain, "split": "core"}
        page.add("shares", study.step("real-shares", reemergence.shares, study.points([blocked]), latents=k, **back))
        depth = study.step("real-depth", reemergence.depth, study.points([blocked]), **back)
        page.add("depth", depth, plots.rerouting(depth))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
