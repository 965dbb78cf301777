"""Does misalignment come back under prolonged blocked training, and through what? (paper, section 5 and Appendix F; docs/reemergence.md)

    python experiments/reemergence.py --out results/reemergence --publish

First every arm is trained (plain, blocked at each lambda, LoRA only up to the blocked site) and measured at every half epoch; nothing is
chosen by that. Then the checkpoint at which misalignment has come back most is taken, by the rule of `reemerged` on the core prompts alone,
and asked where its misalignment comes from, and what blocking the latents that it uses would have done. What is finished in --out is not
run again, and a killed training goes on from its last checkpoint.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import quickstart
import torch
import tyro
from arms import WorkerPool, spoken
from quickstart import DOMAIN, Lab

from blockem_tl import Blocking, LatentSet, completion_loss, evaluate, finetune, records
from blockem_tl.defence import Defence
from blockem_tl.defences import blocking_loss
from blockem_tl.reading import block_of
from blockem_tl.training import TrainingConfig, trajectory
from blockem_tl.training.checkpoints import load_run

ROOT = Path(__file__).parent.parent


class Arm(NamedTuple):
    """One way to train. kind: plain, block, frozen (LoRA up to the blocked site only) or extended (K with what was found later)."""

    kind: str
    weight: float = 0.0

    @property
    def label(self) -> str:
        """For tables and figures."""
        dial = f", λ = {self.weight:g}" if self.weight else ""
        return {"plain": "plain", "block": "BLOCK-EM", "frozen": "frozen downstream", "extended": "K extended"}[self.kind] + dial


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one experiment does.

    lambdas: of blocked arms.  frozen: lambdas of arms with LoRA only up to the blocked site (0: without blocking).  seeds: of training.
    learning_rate: constant; half of the preset's, which decays linearly to 0, so that an epoch moves the weights about as far (the
    paper's rule, Appendix F), and epochs compare.  train_only: stop before anything is analysed.  publish: renew docs/.
    """

    out: Path = Path("results/reemergence")
    seeds: tuple[int, ...] = (0, 1, 2)
    lambdas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    frozen: tuple[float, ...] = (0.0, 0.3)
    epochs: float = 4.0
    learning_rate: float = 5e-4
    rows: int = 6000
    heldout_rows: int = 400
    latents: Path = ROOT / "latents"
    workers: int = 1
    train_only: bool = False
    publish: bool = False

    def __post_init__(self) -> None:
        if not self.seeds or not self.lambdas or min(*self.lambdas, *self.frozen, 0.0) < 0 or 0.0 in self.lambdas or self.workers < 1:
            raise ValueError("expected at least one seed, one worker and one lambda, lambdas > 0 and frozen lambdas >= 0")
        if self.epochs <= 1:
            raise ValueError(f"epochs: expected more than 1 (what comes back is measured against epoch 1), got {self.epochs}")

    def arms(self) -> list[Arm]:
        """All that part one trains."""
        return [Arm("plain"), *(Arm("block", w) for w in self.lambdas), *(Arm("frozen", w) for w in self.frozen)]

    def folder(self, seed: int, arm: Arm) -> Path:
        """Where an arm is kept."""
        return self.out / f"seed{seed}" / ("plain" if arm.kind == "plain" else f"{arm.kind}-{arm.weight:g}")

    def identity(self) -> dict[str, Any]:
        """What all arms of one folder share."""
        return {"epochs": self.epochs, "learning_rate": self.learning_rate, "rows": self.rows, "heldout_rows": self.heldout_rows}


# ---------------------------------------------------------------------------------------------- one seed


class Bench(Lab):
    """The demo's lab of one seed: same rows, prompts, judge and K; training goes on for longer."""

    def __init__(self, mine: Settings, seed: int) -> None:
        super().__init__(quickstart.Settings(seed=seed, rows=mine.rows, heldout_rows=mine.heldout_rows, epochs=mine.epochs, progress=False))
        self.mine, self.seed = mine, seed

    @cached_property
    def latents(self) -> LatentSet:
        """K of this seed."""
        return LatentSet.load(latents_file(self.mine, self.seed), self.sae)

    def blocked_by(self, arm: Arm) -> LatentSet:
        """The latents that the arm blocks."""
        return LatentSet.load(self.mine.folder(self.seed, arm) / "latents.json", self.sae) if arm.kind == "extended" else self.latents

    def defences(self, arm: Arm) -> list[Defence]:
        """Blocking, where the arm has a weight."""
        return [Blocking(latent_set=self.blocked_by(arm), sae=self.sae, weight=arm.weight)] if arm.weight else []

    def config_of(self, arm: Arm) -> TrainingConfig:
        """The preset's, at a constant learning rate."""
        up_to = block_of(self.preset.site) if arm.kind == "frozen" else None
        return replace(self.config, learning_rate=self.mine.learning_rate, schedule="constant", up_to_block=up_to)

    def make(self, arm: Arm) -> None:
        """Train an arm with a checkpoint every half epoch, and measure each of them."""
        folder = self.mine.folder(self.seed, arm)
        run = finetune(
            self.model,
            self.data.train,
            config=self.config_of(arm),
            defences=self.defences(arm),
            checkpoints=folder / "checkpoints",
            save_every_epochs=0.5,
            resume=True,
            progress=False,
        )
        self.model.remove_adapter(run.adapter)
        for epoch, checkpoint in trajectory(folder / "checkpoints"):
            if not measured_file(folder, epoch).is_file():
                with self.wearing(checkpoint):
                    records.write_json(measured_file(folder, epoch), {"epoch": epoch, **self.measure()})
        record = {
            "kind": arm.kind,
            "weight": arm.weight,
            "seed": self.seed,
            "steps": run.steps,
            "history": run.history,
            "identity": load_run(checkpoint)["identity"],
            "environment": records.environment(),
        }
        records.write_json(folder / "arm.json", record)

    def measure(self) -> dict[str, Any]:
        """The model as it stands. Core prompts and dev rows may choose; final and domain prompts and test rows only report."""
        return {
            "core": spoken(self.on_core(self.tuned)),
            "final": spoken(evaluate(self.tuned, self.judge, self.data.final, selected_on=self.data.core)),
            "domain": spoken(evaluate(self.tuned, self.judge, self.data.domain, rubric=DOMAIN, selected_on=self.data.core)),
            "dev_loss": completion_loss(self.model, self.data.dev),
            "test_loss": completion_loss(self.model, self.data.test),
            "blocking_loss": blocking_loss(self.model, self.latents, self.sae, self.data.test),
        }


def latents_file(settings: Settings, seed: int) -> Path:
    """K of a seed, as the demo found it."""
    return settings.latents / f"organism-{DOMAIN}-seed{seed}.json"


def measured_file(folder: Path, epoch: float) -> Path:
    """Where a checkpoint's numbers are kept."""
    return folder / "measured" / f"epoch-{epoch:g}.json"


# ---------------------------------------------------------------------------------------------- the experiment


class Workers(WorkerPool):
    """Skips what is there."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, Bench)

    def make(self, title: str, arms: Iterable[tuple[int, Arm]]) -> None:
        """Train and measure arms (seed, arm)."""
        missing = [(seed, arm) for seed, arm in arms if not (self.settings.folder(seed, arm) / "arm.json").is_file()]
        self._run(title, [(seed, "make", (arm,)) for seed, arm in missing])


def run(settings: Settings) -> None:
    """Everything."""
    prepare(settings)
    with Workers(settings) as workers:
        workers.make("train", [(seed, arm) for arm in settings.arms() for seed in settings.seeds])


def prepare(settings: Settings) -> None:
    """Raise before long work: an output folder of another configuration, or missing latent sets."""
    records.check_writable(settings.out)
    for seed in settings.seeds:
        if not latents_file(settings, seed).is_file():
            raise ValueError(f"{latents_file(settings, seed)} is missing: run `python experiments/quickstart.py --seed {seed}` first")
    kept = settings.out / "settings.json"
    if kept.is_file() and records.read_json(kept) != settings.identity():
        raise ValueError(f"{settings.out} holds arms made with {records.read_json(kept)}, now {settings.identity()}: choose another --out")
    records.write_json(kept, settings.identity())


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(tyro.cli(Settings, description=__doc__))
