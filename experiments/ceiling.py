"""Does the ceiling that is computed before training tell what training then reaches? (no figure of the paper)

    python experiments/ceiling.py --preset organism
    python experiments/ceiling.py --preset smollm2-135m --domain cars --nats 45 --matched 1.03 --epochs 1.6 --sizes 20 60 200 --random 60

For sets of several sizes and for random ones, blocked on answers or also on questions: the share of plain's shift that goes when the set's
change is taken out of plain's forward (`mediation`), and the share that is gone in a model trained with the set blocked. Both are measured
on the dev pairs: those that found the sets would flatter both.
Time on the organism, two cores beside other work: a quarter of an hour a seed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import tyro
from scipy.stats import spearmanr

from blockem_tl import Run
from blockem_tl.study import controls, preferences
from blockem_tl.study.options import StudyOptions
from blockem_tl.views import studies

ROLES = {"completion": "reply", "all": "prompt+reply"}


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """sizes: of the sets.  random: sizes of the random ones, among these.  nats: the strength, which should be large.  epochs: of blocked
    training, the preset's by default.  matched: stop before that where dev loss is so many times plain's; 0: never."""

    sizes: tuple[int, ...] = (3, 10, 30, 100)
    random: tuple[int, ...] = (10, 100)
    nats: float = 15.0
    epochs: float = 0.0
    matched: float = 0.0
    name: ClassVar[str] = "ceiling"


def main(options: Options) -> None:
    """Take out, train, compare."""
    page, sets = options.page(), [*(f"k{n}" for n in options.sizes), *(f"random{n}" for n in options.random)]
    with options.study() as study:
        study.train([Run()])
        for n in options.sizes:
            study.latents(f"k{n}", preferences.attributed, n=n)
        for n in options.random:
            study.latents(f"random{n}", controls.random_beside, beside=f"k{n}")
        carried = study.step("ceilings-dev", preferences.ceiling, study.points([Run()]), sets=sets, split="dev")
        runs = {(name, where): blocked(options, name, where) for name in sets for where in ROLES}
        study.train(runs.values())
        points = study.points([Run(defence="base"), Run(), *runs.values()])
        reached = preferences.table(study.preferences("dev", points), study.losses(points), against="plain").set_index("run")
        frame = pd.DataFrame([row(carried, reached, run, *key) for key, run in runs.items()])
    page.add("combinations", frame, studies.against(frame, x="ceiling", y="removed", label="positions"))
    rank = float(spearmanr(frame["ceiling"], frame["removed"]).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    error = (frame["removed"] - frame["ceiling"]).abs().mean()
    page.add("agreement", pd.DataFrame([{"combinations": len(frame), "rank_correlation": rank, "mean_error_points": 100 * error}]))


def blocked(options: Options, name: str, where: str) -> Run:
    """A set blocked at these positions."""
    over: dict[str, Any] = {"positions": where, "reference": "live", **({"epochs": options.epochs} if options.epochs else {})}
    return Run(defence="block", strength=options.nats, unit="nats", latents=name, matched=options.matched, overrides=over)


def row(carried: Any, reached: Any, run: Run, name: str, where: str) -> dict[str, Any]:
    """A set's ceiling, over seeds, and what training reached."""
    part = carried[(carried["taken_out"] == name) & (carried["roles"] == ROLES[where])]
    found = reached.loc[run.label]
    about = {"latents": name, "positions": where, "ceiling": part["removed"].mean()}
    return about | {key: found[key] for key in ("removed", "removed_low", "removed_high", "test_loss_change")}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
