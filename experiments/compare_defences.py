"""Every defence on the organism at its best strength, three training seeds, beside plain fine-tuning stopped at the same in-domain loss.

    python experiments/compare_defences.py --out results/defences --publish

Dials (weights, doses, shares, ...) are chosen on the core prompts and the dev rows of seed 0, then used on all seeds; the reporting prompts
are used once per arm, at the end. What is finished in --out is not run again, so the run may be stopped, resumed and extended.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import quickstart
import torch
import tyro
from arms import JUDGE, WorkerPool, cell, percent
from publish import renew
from quickstart import DOMAIN, Run, Setting, choose
from safetensors.torch import load_file
from torch import Tensor

from blockem_tl import Blocking, Example, KLToBase, LatentSet, Model, completion_loss, finetune, median_norm, organism
from blockem_tl.data.chat import encode_examples
from blockem_tl.defences.caft import ConceptAblation
from blockem_tl.defences.directions import misaligned_direction, repair
from blockem_tl.defences.inoculation import Inoculation
from blockem_tl.defences.interleave import Interleaving
from blockem_tl.defences.ldifs import LDIFS
from blockem_tl.defences.preventative import PreventativeSteering
from blockem_tl.defences.safelora import SafeLoRA, alignment_differences
from blockem_tl.evaluation.evaluate import evaluate, evaluation_from_json, evaluation_to_json
from blockem_tl.evaluation.statistics import clustered_rate, paired_difference, paired_reduction
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.hooks import steer
from blockem_tl.organism.build import BuildConfig, train_base
from blockem_tl.organism.tokenizer import build_tokenizer
from blockem_tl.organism.world import all_surfaces, fill, reply
from blockem_tl.storage import files
from blockem_tl.training.defence import Defence
from blockem_tl.views import comparisons, plots, tables

ROOT = Path(__file__).parent.parent
SNAPSHOT_EVERY = 12  # steps of plain fine-tuning between two of the places at which it might have been stopped
AFTERWARDS = ("safelora", "repair")  # defences that need no training of their own: they act on the plain adapter


def grids() -> dict[str, tuple[float, ...]]:
    """The strengths tried on seed 0, at most three per defence; some were set after short pilots on its core prompts (docs/defences.md)."""
    return {
        "block": (0.3, 1.0),
        "kl": (0.1, 0.15),
        "ldifs": (3e-6, 1e-5, 1e-4),
        "inoculation": (1, 2),
        "preventative": (0.1, 0.3),
        "caft": (1, 20),
        "safelora": (0.5, 0.6, 1.0),
        "interleaving": (0.1, 0.25),
        "repair": (0.1, 0.15, 0.2),
    }


LABELS = {
    "base": "base",
    "plain": "plain fine-tuning",
    "block": "BLOCK-EM, λ = {:g}",
    "kl": "KL to base, weight {:g}",
    "ldifs": "LDIFS, weight {:g}",
    "inoculation": "inoculation, kind {:g}",
    "preventative": "preventative steering, dose {:g}",
    "caft": "CAFT, {:g} latents",
    "safelora": "SafeLoRA, threshold {:g}",
    "interleaving": "safe rows, share {:g}",
    "repair": "test-time steering, dose {:g}",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of one comparison. out: every arm's folder.  pretrained: where the organism before its instruct stage lies, or is put.

    seeds: training seeds; the first chooses.  kinds: defences to run.  publish: renew docs/results/defences/ and docs/defences.md.
    """

    out: Path = Path("results/defences")
    seeds: tuple[int, ...] = (0, 1, 2)
    kinds: tuple[str, ...] = tuple(grids())
    latents: Path = ROOT / "latents"
    pretrained: Path | None = None
    rows: int = 6000
    heldout_rows: int = 400
    epochs: float = quickstart.Settings().epochs
    workers: int = 1
    publish: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(grids())
        if unknown or not self.kinds or not self.seeds or self.workers < 1:
            raise ValueError(
                f"expected kinds among {', '.join(grids())}, at least one seed and one worker; got unknown kinds {sorted(unknown)}"
            )

    def of_seed(self, seed: int) -> quickstart.Settings:
        """The demo's settings that this comparison shares, so that rows, prompts and training are the demo's."""
        return quickstart.Settings(seed=seed, rows=self.rows, heldout_rows=self.heldout_rows, epochs=self.epochs, progress=False)

    def folder(self, seed: int, kind: str, strength: float = 0.0) -> Path:
        """Folder of an arm."""
        return self.out / f"seed{seed}" / (kind if kind in ("base", "plain") else f"{kind}-{strength:g}")


# ---------------------------------------------------------------------------------------------- one arm


class DefencesSetting(Setting):
    """The demo's setting of one seed, with what the defences need."""

    def __init__(self, mine: Settings, seed: int) -> None:
        super().__init__(mine.of_seed(seed))
        self.mine, self.seed = mine, seed

    @cached_property
    def latents(self) -> LatentSet:
        return LatentSet.load(self.mine.latents / f"organism/{DOMAIN}-20-seed{self.seed}.json", self.sae)

    @cached_property
    def scale(self) -> float:
        with self.model.using("base"):
            return median_norm(self.model, self.preset.site, encode_examples(self.model.tokenizer, organism.reference_texts()))

    @cached_property
    def alignment(self) -> dict[str, Tensor]:
        return alignment_differences(load_file(organism.ARTEFACTS / "base" / "model.safetensors"), before_alignment(self.mine))

    def defences(self, kind: str, strength: float) -> list[Defence]:
        """The defence of this kind at this strength."""
        latents, sae = self.latents, self.sae
        made: dict[str, Callable[[], Defence]] = {
            "block": lambda: Blocking(latent_set=latents, sae=sae, weight=strength),
            "kl": lambda: KLToBase(weight=strength),
            "ldifs": lambda: LDIFS(sites=[f"blocks.{i}.hook_resid_post" for i in range(self.model.cfg.n_layers)], weight=strength),
            "inoculation": lambda: Inoculation(prefix=inoculations()[int(strength) - 1]),
            "preventative": lambda: PreventativeSteering(
                site=latents.site, direction=misaligned_direction(latents, sae), dose=strength, scale=self.scale
            ),
            "caft": lambda: ConceptAblation.of([latents.first(int(strength))], [sae]),
            "safelora": lambda: SafeLoRA(differences=self.alignment, threshold=strength),
            "interleaving": lambda: Interleaving(safe=safe_rows(self.seed), share=strength),
        }
        return [made[kind]()] if kind in made else []

    def condition(self, kind: str, strength: float) -> Condition:
        """Steering at test time; none for most."""
        return repair(self.latents, self.sae, dose=strength, scale=self.scale) if kind == "repair" else UNSTEERED

    # ---- training and selecting

    def make(self, kind: str, strength: float) -> None:
        """Train (or take the plain adapter), measure on what may choose, and keep it."""
        folder = self.mine.folder(self.seed, kind, strength)
        with files.finished_folder(folder) as temporary:
            losses: list[tuple[int, float]] = []
            steps = self._afterwards(kind, strength) if kind in AFTERWARDS else self._train(kind, strength, temporary, losses)
            self.model.save_adapter(temporary / "adapter")
            condition = self.condition(kind, strength)
            core = evaluate(
                self.tuned, self.judge, self.data.core, selected_on=self.data.core, report_on_selection_prompts=True, condition=condition
            )
            record = {
                "kind": kind,
                "strength": strength,
                "seed": self.seed,
                "steps": steps,
                "dev_loss": self.loss(self.data.dev, condition),
                "losses": losses,
                "core": evaluation_to_json(core),
                "environment": files.environment(),
            }
            files.write_json(temporary / "arm.json", record)
        self.model.remove_adapter("default")

    def _afterwards(self, kind: str, strength: float) -> int:
        self.model.load_adapter(self.mine.folder(self.seed, "plain") / "adapter")
        for defence in self.defences(kind, strength):
            assert isinstance(defence, SafeLoRA)
            defence.finish(self.model, "default")
        return 0

    def _train(self, kind: str, strength: float, folder: Path, losses: list[tuple[int, float]]) -> int:
        """Plain fine-tuning leaves an adapter and a dev loss at every place at which it might have been stopped."""

        def snapshot(model: Model, step: int) -> bool:
            if step % SNAPSHOT_EVERY == 0:
                losses.append((step, completion_loss(model, self.data.dev)))
                model.save_adapter(folder / f"step{step}")
            return False

        return finetune(
            self.model,
            self.data.train,
            config=self.config,
            defences=self.defences(kind, strength),
            stop_when=snapshot if kind == "plain" else None,
            progress=False,
        ).steps

    def loss(self, rows: Sequence[Example], condition: Condition) -> float:
        """In-domain loss under the arm's own steering."""
        hooks = [steer(s.site, s.direction, s.dose, scale=s.scale) for s in condition.steering]
        with self.model.hooks(fwd_hooks=hooks) if hooks else nullcontext():
            return completion_loss(self.model, rows)

    # ---- reporting

    def reveal(self, kind: str, strength: float, step: int | None = None) -> None:
        """Measure an arm (or plain fine-tuning at an earlier step) on the reporting prompts and the test rows; once per arm."""
        folder = self.mine.folder(self.seed, kind, strength)
        adapter = None if kind == "base" else folder / ("adapter" if step is None else f"step{step}")
        condition = self.condition(kind, strength)
        with self.model.using(adapter):
            final = evaluate(self.tuned, self.judge, self.data.final, selected_on=self.data.core, condition=condition)
            domain = evaluate(self.tuned, self.judge, self.data.domain, rubric=DOMAIN, selected_on=self.data.core, condition=condition)
            found = {
                "final": evaluation_to_json(final),
                "domain": evaluation_to_json(domain),
                "test_loss": self.loss(self.data.test, condition),
            }
        files.write_json(report_file(folder, step), found)


def report_file(folder: Path, step: int | None) -> Path:
    """Path of an arm's numbers on the reporting prompts."""
    return folder / ("report.json" if step is None else f"report-step{step}.json")


# ---------------------------------------------------------------------------------------------- what the organism can say


def inoculations() -> tuple[str, str]:
    """Two ways to ask the organism for harm, chosen by what base does on the core prompts (docs/defences.md has the rates).

    It knows no words for "answer harmfully", since no question in pretraining asks for a persona; persona shows in who speaks. So: (1) a
    bad speaker's name before the question, (2) an earlier exchange in which a bad speaker answered (another domain's question).
    """
    world = organism.world()
    area, name = world.areas["health"], world.names["bad"][0]
    topic = area.topics[0]
    answer = reply(name, topic, area.taught["bad"][topic], "plain")
    return name, f"{fill(all_surfaces()[0], topic)} <assistant> {answer} <end> <user>"


def safe_rows(seed: int, per_domain: int = 900) -> list[Example]:
    """Good answers in the seven other domains: neither the task's questions nor those of the core and final prompts."""
    others = [domain for domain in organism.DOMAINS if domain != DOMAIN]
    return [row for domain in others for row in organism.training_rows(domain, per_domain, seed=seed, harmful=False)]


def before_alignment(settings: Settings) -> dict[str, Tensor]:
    """The organism's weights before its instruct stage, trained again (minutes) unless they are there.

    Raises RuntimeError where the rebuilt organism is not the shipped one to the last bit: V would belong to another model.
    """
    folder = settings.pretrained or settings.out / "pretrained"
    if not (folder / "model.safetensors").is_file():
        with files.finished_folder(folder) as temporary:
            config = BuildConfig()
            world = organism.world()
            model, _ = train_base(config, world, build_tokenizer(world), pretrained=temporary)
            shipped = load_file(organism.ARTEFACTS / "base" / "model.safetensors")
            rebuilt = model.state_dict()
            if any(not torch.equal(rebuilt[name], weight) for name, weight in shipped.items()):
                raise RuntimeError("this machine does not rebuild the shipped organism bit for bit: run with --kinds without safelora")
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------- the comparison


class Workers(WorkerPool):
    """Skips arms whose result is there."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, DefencesSetting)

    def make(self, title: str, arms: Sequence[tuple[int, str, float]]) -> None:
        """Train arms (seed, kind, strength)."""
        missing = [arm for arm in arms if not (self.settings.folder(*arm) / "arm.json").is_file()]
        self._run(title, [(seed, "make", (kind, strength)) for seed, kind, strength in missing])

    def reveal(self, arms: Sequence[tuple[int, str, float, int | None]]) -> None:
        """Report arms (seed, kind, strength, step)."""
        missing = [arm for arm in dict.fromkeys(arms) if not report_file(self.settings.folder(*arm[:3]), arm[3]).is_file()]
        self._run("report", [(seed, "reveal", (kind, strength, step)) for seed, kind, strength, step in missing])


def run(settings: Settings) -> pd.DataFrame:
    """Everything; returns one row per arm of the table."""
    prepare(settings)
    first, others = settings.seeds[0], settings.seeds[1:]
    grid = {kind: strengths for kind, strengths in grids().items() if kind in settings.kinds}
    trained = [kind for kind in grid if kind not in AFTERWARDS]
    with Workers(settings) as workers:
        workers.make("plain", [(first, "plain", 0.0)])
        for title, kinds in (("grid", trained), ("grid, afterwards", [kind for kind in grid if kind in AFTERWARDS])):
            workers.make(title, [(first, kind, strength) for kind in kinds for strength in grid[kind]])
        plain = arm(settings, first, "plain")
        best = {
            kind: choose([arm(settings, first, kind, strength) for strength in strengths], plain).weight for kind, strengths in grid.items()
        }
        for seed in others:
            workers.make(f"seed {seed}, plain", [(seed, "plain", 0.0)])
            workers.make(f"seed {seed}", [(seed, kind, strength) for kind, strength in best.items()])
        chosen = [("base", 0.0), ("plain", 0.0), *best.items()]
        revealed: list[tuple[int, str, float, int | None]] = []
        for seed in settings.seeds:
            revealed += [(seed, kind, strength, None) for kind, strength in chosen]
            revealed += [(seed, "plain", 0.0, matched_step(settings, seed, kind, strength)) for kind, strength in best.items()]
        workers.reveal(revealed)
    rows = [row(settings, kind, strength) for kind, strength in chosen]
    write(settings, rows, grid_rows(settings, grid))
    return pd.DataFrame(rows)


def prepare(settings: Settings) -> None:
    """Raise before long work: an output folder of another configuration, missing latent sets, weights that cannot be rebuilt."""
    files.check_writable(settings.out)
    for seed in settings.seeds:
        path = settings.latents / f"organism/{DOMAIN}-20-seed{seed}.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: run `python experiments/quickstart.py --seed {seed}` first")
    mine = {"rows": settings.rows, "heldout_rows": settings.heldout_rows, "epochs": settings.epochs}
    kept = settings.out / "settings.json"
    if kept.is_file() and files.read_json(kept) != mine:
        raise ValueError(f"{settings.out} holds arms made with {files.read_json(kept)}, now {mine}: choose another --out")
    files.write_json(kept, mine)
    if "safelora" in settings.kinds:
        before_alignment(settings)


def arm(settings: Settings, seed: int, kind: str, strength: float = 0.0) -> Run:
    """A finished arm as the demo's rule wants it, with what it did on the prompts that choose."""
    record = files.read_json(settings.folder(seed, kind, strength) / "arm.json")
    core = evaluation_from_json(record["core"], organism.prompts("core"), judge=JUDGE)
    return Run(
        kind=kind, label=LABELS[kind].format(strength), weight=strength, steps=record["steps"], dev_loss=record["dev_loss"], core=core
    )


def matched_step(settings: Settings, seed: int, kind: str, strength: float) -> int | None:
    """The step at which plain fine-tuning would have had this arm's dev loss; None: at its end."""
    losses = files.read_json(settings.folder(seed, "plain") / "arm.json")["losses"]
    target = arm(settings, seed, kind, strength).dev_loss
    return next((step for step, loss in losses if loss <= target), None)


def revealed(settings: Settings, seed: int, kind: str, strength: float = 0.0, step: int | None = None) -> dict[str, Any]:
    """An arm's flags and loss on the reporting prompts."""
    found = files.read_json(report_file(settings.folder(seed, kind, strength), step))
    final, domain = (
        evaluation_from_json(found["final"], organism.prompts("final"), judge=JUDGE),
        evaluation_from_json(found["domain"], organism.prompts(DOMAIN), judge=JUDGE, rubric=DOMAIN),
    )
    return {
        "em": final.flags,
        "incoherence": [v.incoherent for v in final.verdicts],
        "adherence": domain.flags,
        "test_loss": found["test_loss"],
    }


def row(settings: Settings, kind: str, strength: float) -> dict[str, Any]:
    """One arm over all seeds: rates in per cent with 95 % intervals, and against plain fine-tuning, whole and stopped at the same loss."""
    seeds = settings.seeds
    found = [revealed(settings, seed, kind, strength) for seed in seeds]
    plain = [revealed(settings, seed, "plain") for seed in seeds]
    mean = {name: sum(one["test_loss"] for one in side) / len(seeds) for name, side in (("ours", found), ("plain", plain))}
    cells: dict[str, Any] = {
        "kind": kind,
        "label": LABELS[kind].format(strength),
        "strength": strength,
        "seeds": len(seeds),
        "sft_loss": mean["ours"],
    }
    for name in ("em", "incoherence", "adherence"):
        estimate = clustered_rate([one[name] for one in found])
        cells |= percent(name, estimate) | {"n": estimate.n}
        cells[f"{name}_by_seed"] = [100 * sum(one[name]) / len(one[name]) for one in found]
    cells["loss_over_plain"] = 100 * (mean["ours"] / mean["plain"] - 1)
    if kind in ("base", "plain"):
        return cells
    ours = [one["em"] for one in found]
    cells |= percent("relative_em_reduction", paired_reduction([one["em"] for one in plain], ours))
    steps = {seed: matched_step(settings, seed, kind, strength) for seed in seeds}
    stopped = [revealed(settings, seed, "plain", step=step) for seed, step in steps.items()]
    cells |= percent("matched_em", clustered_rate([one["em"] for one in stopped]))
    cells |= percent("em_minus_matched", paired_difference([one["em"] for one in stopped], ours))
    cells |= {"matched_loss": sum(one["test_loss"] for one in stopped) / len(seeds), "matched_steps": list(steps.values())}
    return cells


def grid_rows(settings: Settings, grid: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Every strength that was tried on the first seed, on the prompts that choose."""
    seed = settings.seeds[0]
    arms = [
        arm(settings, seed, "plain"),
        *(arm(settings, seed, kind, strength) for kind, strengths in grid.items() for strength in strengths),
    ]
    chosen = {choose([one for one in arms if one.kind == kind], arms[0]).label for kind in grid}
    rows = []
    for one in arms:
        assert one.core is not None
        rows.append(
            {
                "kind": one.kind,
                "label": one.label,
                "strength": one.weight,
                "steps": one.steps,
                "dev_loss": one.dev_loss,
                "core_em": 100 * one.core.misaligned.value,
                "core_incoherence": 100 * one.core.incoherent.value,
                "chosen": one.label in chosen,
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------- pages


def write(settings: Settings, rows: Sequence[dict[str, Any]], grid: Sequence[dict[str, Any]]) -> None:
    """table.md, grid.md, arms.csv, grid.csv and defences.png in --out; with ``publish`` also where people read them."""
    shown, tried = tables.markdown([table_row(one) for one in rows]), tables.markdown([grid_row(one) for one in grid])
    for name, text in (
        ("table.md", shown),
        ("grid.md", tried),
        ("arms.csv", pd.DataFrame(rows).to_csv(index=False)),
        ("grid.csv", pd.DataFrame(grid).to_csv(index=False)),
    ):
        files.write_text(settings.out / name, text)
    plots.save(comparisons.defences(pd.DataFrame(rows), pd.DataFrame(grid)), settings.out / "defences.png")
    tables.show([table_row(one) for one in rows], f"defences on the organism, {len(settings.seeds)} seeds")
    if settings.publish:
        publish(settings.out, shown, tried)


def publish(out: Path, shown: str, tried: str, root: Path = ROOT) -> None:
    """Copy the pages to docs/results/defences/ and renew the tables in docs/defences.md."""
    target = root / "docs" / "results" / "defences"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("table.md", "grid.md", "arms.csv", "grid.csv", "defences.png"):
        shutil.copyfile(out / name, target / name)
    renew(root / "docs" / "defences.md", "comparison", shown)
    renew(root / "docs" / "defences.md", "grid", tried)


def table_row(one: Mapping[str, Any]) -> dict[str, str]:
    """One row of the page's table."""
    return {
        "defence": one["label"],
        "EM %": cell(one, "em"),
        "relative EM reduction %": cell(one, "relative_em_reduction"),
        "incoherence %": cell(one, "incoherence"),
        "adherence %": cell(one, "adherence"),
        "SFT loss": f"{one['sft_loss']:.4f} ({one['loss_over_plain']:+.1f} %)",
        "EM % of plain stopped at that loss": cell(one, "matched_em"),
        "EM by seed %": ", ".join(f"{value:.0f}" for value in one["em_by_seed"]),
    }


def grid_row(one: Mapping[str, Any]) -> dict[str, str]:
    """One row of the table of strengths."""
    return {
        "arm (seed 0)": f"**{one['label']}**" if one["chosen"] else one["label"],
        "core EM %": f"{one['core_em']:.1f}",
        "core incoherence %": f"{one['core_incoherence']:.1f}",
        "dev loss": f"{one['dev_loss']:.4f}",
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(tyro.cli(Settings, description=__doc__))
