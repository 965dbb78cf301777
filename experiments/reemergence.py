"""Does misalignment come back under prolonged blocked training, and through what? (paper, section 5 and Appendix F; docs/reemergence.md)

    python experiments/reemergence.py --out results/reemergence --publish

First every arm is trained (plain, blocked at each lambda, LoRA only up to the blocked site) and measured at every half epoch; nothing is
chosen by that. Then the checkpoint at which misalignment has come back most is taken, by the rule of `reemerged` on the core prompts alone,
and asked where its misalignment comes from, and what blocking the latents that it uses would have done. What is finished in --out is not
run again, and a killed training goes on from its last checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import quickstart
import reemergence_pages as pages
import torch
import tyro
from arms import JUDGE, WorkerPool, percent
from quickstart import DOMAIN, Setting

from blockem_tl import (
    Blocking,
    Example,
    Generation,
    LatentSet,
    Verdict,
    capacity_ratio,
    completion_loss,
    diagnose_rerouting,
    evaluate,
    finetune,
    median_norm,
    organism,
    random_latents,
    reconstruction_quality,
    shift_by_site,
)
from blockem_tl.analysis.patching.decoding import decode_patching
from blockem_tl.analysis.patching.endpoints import UNPATCHED
from blockem_tl.analysis.patching.prompt import prompt_patching_stream
from blockem_tl.defences.blocking import blocking_loss
from blockem_tl.discovery.extension import extension_rounds
from blockem_tl.discovery.pipeline import discover
from blockem_tl.evaluation.evaluate import evaluation_from_json, evaluation_to_json
from blockem_tl.evaluation.statistics import clustered_rate, paired_difference
from blockem_tl.models.activations import block_of
from blockem_tl.storage import files
from blockem_tl.training.checkpoints import load_run, trajectory
from blockem_tl.training.config import TrainingConfig
from blockem_tl.training.defence import Defence
from blockem_tl.training.identity import differences

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """One way to train. kind: plain, block, or frozen (LoRA up to the blocked site only).

    n_latents: where K is extended by what a re-emerged model used, how many latents are blocked; 0: K alone.
    control: the same number of latents, those besides K drawn at random.
    """

    kind: str
    weight: float = 0.0
    n_latents: int = 0
    control: bool = False

    @property
    def label(self) -> str:
        """For tables and figures."""
        strength = f", λ = {self.weight:g}" if self.weight else ""
        extended = f", K extended to {self.n_latents}{' at random' if self.control else ''}" if self.n_latents else ""
        return {"plain": "plain", "block": "BLOCK-EM", "frozen": "frozen downstream"}[self.kind] + strength + extended

    @property
    def folder(self) -> str:
        """Its name on disk."""
        if self.kind == "plain":
            return "plain"
        return f"{self.kind}-{self.weight:g}" + (f"-{self.n_latents}" if self.n_latents else "") + ("-random" if self.control else "")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of one experiment.

    seeds: of training.  lambdas: of blocked arms.  frozen: those of arms with LoRA only up to the blocked site (0: without blocking).
    budget: how many latents may be blocked in all when K is extended.
    learning_rate: constant; half of the preset's, which decays linearly to 0, so that an epoch moves the weights about as far (the
    paper's rule, Appendix F), and epochs compare.  train_only: stop before anything is analysed.  publish: renew docs/.
    """

    out: Path = Path("results/reemergence")
    seeds: tuple[int, ...] = (0, 1, 2)
    lambdas: tuple[float, ...] = (0.0003, 0.003, 0.03, 0.1, 0.3)
    frozen: tuple[float, ...] = (0.0, 0.3)
    budget: int = 40
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

    def arms(self) -> list[Run]:
        """All that part one trains."""
        return [Run("plain"), *(Run("block", w) for w in self.lambdas), *(Run("frozen", w) for w in self.frozen)]

    def folder(self, seed: int, arm: Run) -> Path:
        """Folder of an arm."""
        return self.out / f"seed{seed}" / arm.folder

    def identity(self) -> dict[str, Any]:
        """Fields that all arms of one folder share."""
        return {"epochs": self.epochs, "learning_rate": self.learning_rate, "rows": self.rows, "heldout_rows": self.heldout_rows}


# ---------------------------------------------------------------------------------------------- one seed


class ReemergenceSetting(Setting):
    """The demo's setting of one seed: same rows, prompts, judge and K; training goes on for longer."""

    def __init__(self, mine: Settings, seed: int) -> None:
        super().__init__(quickstart.Settings(seed=seed, rows=mine.rows, heldout_rows=mine.heldout_rows, epochs=mine.epochs, progress=False))
        self.mine, self.seed = mine, seed

    @cached_property
    def latents(self) -> LatentSet:
        """K of this seed."""
        return LatentSet.load(latents_file(self.mine, self.seed), self.sae)

    def blocked_by(self, arm: Run) -> LatentSet:
        """The latents that the arm blocks."""
        return LatentSet.load(self.folder(arm) / "latents.json", self.sae) if arm.n_latents else self.latents

    def folder(self, arm: Run) -> Path:
        """Folder of an arm of this seed."""
        return self.mine.folder(self.seed, arm)

    def defences(self, arm: Run) -> list[Defence]:
        """Blocking, where the arm has a weight."""
        return [Blocking(latent_set=self.blocked_by(arm), sae=self.sae, weight=arm.weight)] if arm.weight else []

    def config_of(self, arm: Run) -> TrainingConfig:
        """The preset's, at a constant learning rate."""
        up_to = block_of(self.preset.site) if arm.kind == "frozen" else None
        return replace(self.config, learning_rate=self.mine.learning_rate, schedule="constant", up_to_block=up_to)

    def make(self, arm: Run) -> None:
        """Train an arm with a checkpoint every half epoch, and measure each of them."""
        folder = self.folder(arm)
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
                with self.model.using(checkpoint):
                    files.write_json(measured_file(folder, epoch), {"epoch": epoch, **self.measure()})
        record = {
            "kind": arm.kind,
            "weight": arm.weight,
            "seed": self.seed,
            "steps": run.steps,
            "history": run.history,
            "identity": load_run(checkpoint)["identity"],
            "environment": files.environment(),
        }
        files.write_json(folder / "arm.json", record)

    def measure(self) -> dict[str, Any]:
        """The model as it stands. Core prompts and dev rows may choose; final and domain prompts and test rows only report."""
        return {
            "core": evaluation_to_json(self.on_core(self.tuned)),
            "final": evaluation_to_json(evaluate(self.tuned, self.judge, self.data.final, selected_on=self.data.core)),
            "domain": evaluation_to_json(evaluate(self.tuned, self.judge, self.data.domain, rubric=DOMAIN, selected_on=self.data.core)),
            "dev_loss": completion_loss(self.model, self.data.dev),
            "test_loss": completion_loss(self.model, self.data.test),
            "blocking_loss": blocking_loss(self.model, self.latents, self.sae, self.data.test),
        }

    # ---- where its misalignment comes from

    def checkpoint(self, arm: Run, epoch: float) -> Path:
        """A checkpoint of the very run that was measured. Raises ValueError where another run's lies in its place."""
        folder = self.folder(arm)
        found = dict(trajectory(folder / "checkpoints"))[epoch]
        changed = differences(load_run(found)["identity"], files.read_json(folder / "arm.json")["identity"])
        if changed:
            raise ValueError(f"{found} is a checkpoint of another run than {folder / 'arm.json'} reports: {'; '.join(changed)}")
        return found

    def patch(self, arm: Run, epoch: float) -> None:
        """Base's states at every block's output, over the prompt or at every decoding step, on the final prompts."""
        sites = [f"blocks.{block}.hook_resid_post" for block in range(self.model.cfg.n_layers)]
        options: dict[str, Any] = {"max_new_tokens": self.preset.max_new_tokens, "batch_size": 960, "progress": False}
        with self.model.using(self.checkpoint(arm, epoch)):
            swept = list(prompt_patching_stream(self.model, self.data.final, [(), *((site,) for site in sites)], **options))
            decoded = [(site, decode_patching(self.model, self.data.final, [site], **options)) for site in sites]
        rows = [self._judged("prompt" if group else UNPATCHED, " + ".join(group), generations) for group, generations in swept]
        rows += [self._judged("decode", site, generations) for site, generations in decoded]
        files.write_json(patched_file(self.folder(arm), epoch), rows)

    def _judged(self, patched: str, site: str, generations: Sequence[Generation]) -> dict[str, Any]:
        verdicts = self.judge.grade([g.prompt for g in generations], [g.reply for g in generations])
        replies, labels = [g.reply for g in generations], [v.label for v in verdicts]
        return {"patched": patched, "site": site or UNPATCHED, "replies": replies, "labels": labels}

    # ---- what moved instead

    def diagnose(self, arm: Run, epoch: float) -> None:
        """Rerouting of the checkpoint against plain's at the same epoch, both reading plain's replies; and the SAE over both runs (H1)."""
        plain = Run("plain")
        rows = self.said_by(plain, epoch)
        with self.beside_plain(arm, epoch) as both:
            found = diagnose_rerouting(self.model, self.sae, self.latents, rows, **both, progress=False)
            frames = {"blocked": found.blocked, "outside": found.outside, "shares": found.shares}
            frames["depth"] = shift_by_site(self.model, rows, **both, progress=False).frame
        texts = {"final prompts, plain's replies": rows, "reference texts": organism.reference_texts()}
        frames["reconstruction"] = pd.concat(
            reconstruction_quality(self.model, self.sae, read, checkpoints=self.folder(one) / "checkpoints", progress=False).frame.assign(
                run=one.label, rows=of
            )
            for one in (plain, arm)
            for of, read in texts.items()
        )
        with files.finished_folder(diagnosed_folder(self.folder(arm), epoch)) as temporary:
            for name, frame in frames.items():
                files.write_text(temporary / f"{name}.csv", frame.assign(seed=self.seed).to_csv(index=False))

    @contextmanager
    def beside_plain(self, arm: Run, epoch: float) -> Iterator[dict[str, Any]]:
        """Inside the block the model holds the checkpoint and plain's at the same epoch, under the names that are given."""
        held = {"plain": Run("plain"), "blocked": arm}
        for name, one in held.items():
            self.model.load_adapter(self.checkpoint(one, epoch), name)
        try:
            yield {name: name for name in held}
        finally:
            for name in held:
                self.model.remove_adapter(name)

    def said_by(self, arm: Run, epoch: float, to: Literal["core", "final"] = "final") -> list[Example]:
        """A checkpoint's replies, as rows to read."""
        prompts, replies = getattr(self.data, to), files.read_json(measured_file(self.folder(arm), epoch))[to]["replies"]
        return [Example(id=p.id, prompt=p.text, completion=reply) for p, reply in zip(prompts, replies, strict=True) if reply]

    # ---- acting on it

    def extend(self, arm: Run) -> None:
        """Block what the re-emerged checkpoint uses as well, from the start, until no core reply is misaligned or the budget is spent."""
        rounds = extension_rounds(
            self.latents,
            train=lambda latents: self._blocking(arm, latents),
            measure=lambda trained: self._peak(trained)[1],
            extend=self._larger,
            max_latents=self.mine.budget,
        )
        found = [{"arm": astuple(one.checkpoint), "n_latents": len(one.latent_set), "core_em": one.em} for one in rounds]
        files.write_json(rounds_file(self.mine, self.seed, arm), found)

    def _blocking(self, arm: Run, latents: LatentSet) -> Run:
        """The arm that blocks these latents, trained; the first round's is there already."""
        if latents == self.latents:
            return arm
        larger = Run(arm.kind, arm.weight, len(latents))
        if not (self.folder(larger) / "arm.json").is_file():
            latents.save(self.folder(larger) / "latents.json")
            self.make(larger)
        return larger

    def control(self, arm: Run, larger: Run) -> None:
        """Block as many latents as ``larger`` does, from the start: K, and random ones of those that fire in base or the checkpoint."""
        control, epoch = replace(larger, control=True), self._peak(arm)[0]
        with self.model.using(self.checkpoint(arm, epoch)):
            alive = quickstart.alive_latents(self)
        found = self.blocked_by(larger).latents
        drawn = random_latents(self.sae, larger.n_latents - len(self.latents), seed=self.seed, among=alive, exclude=found)
        self.latents.extended_by(drawn).save(self.folder(control) / "latents.json")
        self.make(control)

    def _peak(self, arm: Run) -> tuple[float, float]:
        return peak(self.mine, self.seed, arm)

    def _larger(self, latents: LatentSet, arm: Run) -> LatentSet:
        """K and what the arm's worst checkpoint uses besides."""
        epoch, _ = self._peak(arm)
        folder = found_folder(self.folder(arm), epoch)
        if not folder.is_dir():
            found = discover(
                self.model,
                self.sae,
                self.judge,
                self.data.core,
                adapter=self.checkpoint(arm, epoch),
                scale=median_norm(self.model, self.preset.site, organism.reference_texts()),
                config=self.preset.discovery,
                extending=latents,
                provenance={"domain": DOMAIN, "seed": self.seed, "arm": arm.label, "epoch": epoch},
                progress=False,
            )
            with files.finished_folder(folder) as temporary:
                found.latent_set.save(temporary / "latents.json")
                found.added.save(temporary / "added.json")
                files.write_text(temporary / "candidates.csv", found.to_frame().to_csv(index=False))
        return LatentSet.load(folder / "latents.json", self.sae)


def latents_file(settings: Settings, seed: int) -> Path:
    """K of a seed, as the demo found it."""
    return settings.latents / f"organism/{DOMAIN}-20-seed{seed}.json"


def measured_file(folder: Path, epoch: float) -> Path:
    """Path of a checkpoint's numbers."""
    return folder / "measured" / f"epoch-{epoch:g}.json"


def patched_file(folder: Path, epoch: float) -> Path:
    """Path of the replies of a patched checkpoint."""
    return folder / f"patched-epoch-{epoch:g}.json"


def found_folder(folder: Path, epoch: float) -> Path:
    """Folder of the latents that a checkpoint uses besides those that it was trained to leave alone."""
    return folder / f"found-epoch-{epoch:g}"


def diagnosed_folder(folder: Path, epoch: float) -> Path:
    """Folder of the tables on rerouting and on the SAE's fit."""
    return folder / f"diagnosed-epoch-{epoch:g}"


def rounds_file(settings: Settings, seed: int, arm: Run) -> Path:
    """Path of the rounds of extending K."""
    return settings.out / f"seed{seed}" / f"rounds-{arm.folder}-budget-{settings.budget}.json"


# ---------------------------------------------------------------------------------------------- which checkpoint is dissected


def measured(settings: Settings, seed: int, arm: Run) -> list[dict[str, Any]]:
    """All checkpoints of a measured arm, the earliest first."""
    found = (settings.folder(seed, arm) / "measured").glob("epoch-*.json")
    return sorted((files.read_json(path) for path in found), key=lambda one: one["epoch"])


def core_em(settings: Settings, seed: int, arm: Run) -> dict[float, float]:
    """Epoch -> EM on the core prompts, as a fraction."""
    prompts = organism.prompts("core")
    return {one["epoch"]: evaluation_from_json(one["core"], prompts, judge=JUDGE).misaligned.value for one in measured(settings, seed, arm)}


def peak(settings: Settings, seed: int, arm: Run) -> tuple[float, float]:
    """(epoch, core EM) of the worst checkpoint after epoch 1; the earliest of equals."""
    later = {epoch: em for epoch, em in core_em(settings, seed, arm).items() if epoch > 1}
    return max(later.items(), key=lambda item: (item[1], -item[0]))


def reemerged(settings: Settings, kind: str) -> Run:
    """The blocked arm of one kind in which misalignment came back most, by the core prompts alone.

    The rule was fixed before any number was seen: of the arms that blocked at first (at most half of plain's EM at epoch 1; all arms
    where none did) the one whose EM rose most from epoch 1 to its worst later checkpoint, on average over seeds. The smaller lambda wins
    a tie. The checkpoint is each seed's `peak`.
    """

    def at_first(arm: Run) -> float:
        return sum(core_em(settings, seed, arm)[1.0] for seed in settings.seeds)

    def rise(arm: Run) -> float:
        return sum(peak(settings, seed, arm)[1] for seed in settings.seeds) - at_first(arm)

    blocked = [arm for arm in settings.arms() if arm.kind == kind and arm.weight]
    held = [arm for arm in blocked if at_first(arm) <= at_first(Run("plain")) / 2] or blocked
    return max(held, key=lambda arm: (rise(arm), -arm.weight))


def peaks_of(settings: Settings, kinds: Sequence[str]) -> dict[Run, dict[int, float]]:
    """The dissected checkpoints: of each kind the arm that `reemerged` takes, and each seed's epoch."""
    return {arm: {seed: peak(settings, seed, arm)[0] for seed in settings.seeds} for arm in (reemerged(settings, k) for k in kinds)}


# ---------------------------------------------------------------------------------------------- the experiment


class Workers(WorkerPool):
    """Skips what is there."""

    def __init__(self, settings: Settings, setting: Callable[[Any, int], Any] = ReemergenceSetting) -> None:
        super().__init__(settings, setting)

    def make(self, title: str, arms: Iterable[tuple[int, Run]]) -> None:
        """Train and measure arms (seed, arm)."""
        missing = [(seed, arm) for seed, arm in arms if not (self.settings.folder(seed, arm) / "arm.json").is_file()]
        self._run(title, [(seed, "make", (arm,)) for seed, arm in missing])

    def dissected(self, kinds: Sequence[str]) -> dict[Run, dict[int, float]]:
        """For what goes on from here: `peaks_of` these kinds, after training plain and their blocked arms where they are missing."""
        needed = [arm for arm in self.settings.arms() if arm.kind == "plain" or (arm.kind in kinds and arm.weight)]
        self.make("train", [(seed, arm) for arm in needed for seed in self.settings.seeds])
        return peaks_of(self.settings, kinds)

    def each(self, title: str, method: str, wanted: Iterable[tuple[int, tuple[Any, ...], Path]]) -> None:
        """Run a method of the seed's setting unless what it writes, whole or not at all, is there: (seed, arguments, path)."""
        self._run(title, [(seed, method, arguments) for seed, arguments, path in wanted if not path.exists()])


def run(settings: Settings) -> None:
    """Everything."""
    prepare(settings)
    with Workers(settings) as workers:
        workers.make("train", [(seed, arm) for arm in settings.arms() for seed in settings.seeds])
        if settings.train_only:
            return
        kinds = ["block", *(["frozen"] if any(settings.frozen) else [])]
        peaks = peaks_of(settings, kinds)
        chosen = [(seed, arm, epoch) for arm, epochs in peaks.items() for seed, epoch in epochs.items()]
        beside = [(seed, Run("plain"), epoch) for seed, epoch in next(iter(peaks.values())).items()]
        for title, where, wanted in (("patch", patched_file, [*chosen, *beside]), ("diagnose", diagnosed_folder, chosen)):
            workers.each(title, title, [(seed, (one, e), where(settings.folder(seed, one), e)) for seed, one, e in wanted])
        workers.each("extend", "extend", [(seed, (arm,), rounds_file(settings, seed, arm)) for arm in peaks for seed in settings.seeds])
        larger = {arm: {s: Run(*files.read_json(rounds_file(settings, s, arm))[-1]["arm"]) for s in settings.seeds} for arm in peaks}
        control = {arm: found for arm, found in larger.items() if arm.kind == kinds[-1]}  # of the arm in which most comes back
        missing = [(s, arm, one) for arm, found in control.items() for s, one in found.items() if one.n_latents]
        wanted = [(s, (arm, one), settings.folder(s, replace(one, control=True)) / "arm.json") for s, arm, one in missing]
        workers.each("control", "control", wanted)
    pages.write(settings.out, results(settings, peaks, larger, control), publish=settings.publish)


# ---------------------------------------------------------------------------------------------- what it says


BySeed = dict[Run, dict[int, Run]]


def results(settings: Settings, peaks: dict[Run, dict[int, float]], larger: BySeed, control: BySeed) -> pages.Results:
    """All numbers.

    Args:
        peaks: the dissected arms, the first of them with LoRA on all blocks, and of each the seeds' epochs.
        larger: of each seed by seed the arm with K extended, or itself where nothing was.
        control: the same for arms that have a control with random latents.
    """
    first = next(iter(peaks))
    drawn = {arm: {s: replace(one, control=bool(one.n_latents)) for s, one in found.items()} for arm, found in control.items()}
    every = {arm: dict.fromkeys(settings.seeds, arm) for arm in settings.arms()}
    every |= {max(arms.values(), key=lambda one: one.n_latents): arms for arms in [*larger.values(), *drawn.values()]}
    shown = [*peaks.items(), (Run("plain"), peaks[first])]
    return pages.Results(
        curves=pd.DataFrame([row for arm, by_seed in every.items() for row in curve(settings, arm, by_seed)]),
        patched=pd.DataFrame([row for arm, epochs in shown for row in patched(settings, arm, epochs)]),
        extended=pd.DataFrame(
            [row for found in (larger, drawn) for arm in found for row in extended(settings, arm, found[arm], peaks[arm])]
        ),
        dissected=pd.DataFrame(
            [dissected(settings, s, arm, e, larger[arm][s]) for arm, epochs in peaks.items() for s, e in epochs.items()]
        ),
        shares=diagnosed(settings, peaks, "shares"),
        depth=diagnosed(settings, peaks, "depth"),
        reconstruction=diagnosed(settings, peaks, "reconstruction").drop(columns="of").drop_duplicates(),  # plain was read beside each
    )


def curve(settings: Settings, name: Run, arms: dict[int, Run]) -> list[dict[str, Any]]:
    """One arm, given seed by seed: a row per epoch, with rates in per cent over all seeds, 95 % intervals and the rise since epoch 1."""
    by_seed = [{one["epoch"]: reported(one) for one in measured(settings, seed, arm)} for seed, arm in arms.items()]
    rows = []
    for epoch in sorted(set.intersection(*map(set, by_seed))):
        found = [of_seed[epoch] for of_seed in by_seed]
        row: dict[str, Any] = {
            "kind": name.kind,
            "weight": name.weight,
            "n_latents": name.n_latents,
            "label": name.label,
            "epoch": epoch,
            "seeds": len(found),
        }
        for rate in ("em", "incoherence", "adherence"):
            estimate = clustered_rate([one[rate] for one in found])
            row |= percent(rate, estimate) | {"n": estimate.n}
        row |= percent("rise", paired_difference([of_seed[1.0]["em"] for of_seed in by_seed], [one["em"] for one in found]))
        row["em_by_seed"] = [100 * sum(one["em"]) / len(one["em"]) for one in found]
        row |= {loss: sum(one[loss] for one in found) / len(found) for loss in ("core_em", "sft_loss", "blocking_loss")}
        rows.append(row)
    return rows


def reported(one: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's flags on the reporting prompts and its losses on the test rows; core EM in per cent."""
    final, domain = (
        evaluation_from_json(one["final"], organism.prompts("final"), judge=JUDGE),
        evaluation_from_json(one["domain"], organism.prompts(DOMAIN), judge=JUDGE, rubric=DOMAIN),
    )
    return {
        "em": final.flags,
        "incoherence": [v.incoherent for v in final.verdicts],
        "adherence": domain.flags,
        "core_em": 100 * evaluation_from_json(one["core"], organism.prompts("core"), judge=JUDGE).misaligned.value,
        "sft_loss": one["test_loss"],
        "blocking_loss": one["blocking_loss"],
    }


def patched(settings: Settings, arm: Run, epochs: dict[int, float]) -> list[dict[str, Any]]:
    """One arm at each seed's checkpoint: a row per patch, with EM, its change against no patch, and incoherence, in per cent."""
    by_seed = [files.read_json(patched_file(settings.folder(seed, arm), epoch)) for seed, epoch in epochs.items()]
    verdicts = [[[Verdict(label=label) for label in row["labels"]] for row in rows] for rows in by_seed]
    rows = []
    for i, known in enumerate(by_seed[0]):
        em = [[v.positive for v in of_seed[i]] for of_seed in verdicts]
        row = {"arm": arm.label, "patched": known["patched"], "site": known["site"], "seeds": len(em), "n": len(em[0])}
        row |= percent("em", clustered_rate(em))
        row |= percent("change", paired_difference([[v.positive for v in of_seed[0]] for of_seed in verdicts], em))
        rows.append(row | percent("incoherence", clustered_rate([[v.incoherent for v in of_seed[i]] for of_seed in verdicts])))
    return rows


def diagnosed(settings: Settings, peaks: dict[Run, dict[int, float]], name: str) -> pd.DataFrame:
    """One of the frames of `ReemergenceSetting.diagnose`, of all dissected arms (column "of") and seeds."""
    files = {(arm, seed): diagnosed_folder(settings.folder(seed, arm), e) for arm, epochs in peaks.items() for seed, e in epochs.items()}
    return pd.concat(pd.read_csv(folder / f"{name}.csv").assign(of=arm.label) for (arm, _), folder in files.items())


def extended(settings: Settings, arm: Run, larger: dict[int, Run], epochs: dict[int, float]) -> list[dict[str, Any]]:
    """EM with K and with K extended at the re-emerged checkpoints' epochs and at the last, and the difference, prompt by prompt.

    A seed in which nothing came back, and so nothing was extended, counts with its one run on both sides.
    """
    rows = []
    last = {seed: measured(settings, seed, arm)[-1]["epoch"] for seed in epochs}
    for label, at in (("re-emerged checkpoint", epochs), ("last", last)):
        sides = [
            [reported(next(one for one in measured(settings, seed, arms[seed]) if one["epoch"] == epoch)) for seed, epoch in at.items()]
            for arms in (dict.fromkeys(epochs, arm), larger)
        ]
        row: dict[str, Any] = {
            "arm": max(larger.values(), key=lambda one: one.n_latents).label,
            "epoch": label,
            "seeds": len(epochs),
            "seeds_extended": sum(one != arm for one in larger.values()),
        }
        for name, found in zip(("k", "extended"), sides, strict=True):
            for rate in ("em", "incoherence"):
                row |= percent(f"{name}_{rate}", clustered_rate([one[rate] for one in found]))
            row[f"{name}_loss"] = sum(one["sft_loss"] for one in found) / len(found)
        before, after = ([one["em"] for one in found] for found in sides)
        rows.append(row | percent("difference", paired_difference(before, after)))
    return rows


def dissected(settings: Settings, seed: int, arm: Run, epoch: float, larger: Run) -> dict[str, Any]:
    """One seed's re-emerged checkpoint, and the same epoch of the run that also blocks what it used."""
    k = LatentSet.load(latents_file(settings, seed))
    row: dict[str, Any] = {"seed": seed, "arm": arm.label, "epoch": epoch, "score_k": sum(k.scores) / len(k)}
    found_more = [("extended", larger, epoch)] if larger != arm else []
    for name, one, at in [("before", arm, 1.0), ("reemerged", arm, epoch), *found_more]:
        found = reported(next(found for found in measured(settings, seed, one) if found["epoch"] == at))
        row |= {f"{name}_core_em": found["core_em"], f"{name}_em": 100 * sum(found["em"]) / len(found["em"])}
    folder = found_folder(settings.folder(seed, arm), epoch)
    if folder.is_dir():
        added = LatentSet.load(folder / "added.json")
        capacity = capacity_ratio(k, added)
        row |= {"score_added": capacity.reemerged, "ratio": capacity.ratio, "n_added": len(added), "added": list(added.latents)}
    return row


def prepare(settings: Settings) -> None:
    """Raise before long work: an output folder of another configuration, or missing latent sets."""
    files.check_writable(settings.out)
    for seed in settings.seeds:
        if not latents_file(settings, seed).is_file():
            raise ValueError(f"{latents_file(settings, seed)} is missing: run `python experiments/quickstart.py --seed {seed}` first")
    kept = settings.out / "settings.json"
    if kept.is_file() and files.read_json(kept) != settings.identity():
        raise ValueError(f"{settings.out} holds arms made with {files.read_json(kept)}, now {settings.identity()}: choose another --out")
    files.write_json(kept, settings.identity())


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(tyro.cli(Settings, description=__doc__))
