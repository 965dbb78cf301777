"""The whole of BLOCK-EM on the embedded organism: misalign, find the latents, block them, and see that it worked.

    python experiments/quickstart.py --seed 0 --out results/quickstart

Every choice (lambda, KL weight) is made on the core prompts and on held-out training rows; the reporting prompts are used once, at the end.
Broken off, the same command goes on: what is trained is not trained again.
"""

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from os import getpid
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from arms import end_with_parent
from filelock import FileLock, Timeout
from sae_lens import SAE
from tqdm.auto import tqdm

from blockem_tl import (
    Blocking,
    Example,
    KLToBase,
    LatentSet,
    Model,
    Prompt,
    completion_loss,
    decoder_directions,
    discover,
    evaluate,
    finetune,
    get_preset,
    load_model,
    load_sae,
    median_norm,
    organism,
    random_latents,
    replies_from,
)
from blockem_tl.data.chat import encode_examples
from blockem_tl.data.checks import check_disjoint
from blockem_tl.defences.blocking import Positions
from blockem_tl.discovery.diffing import mean_activations
from blockem_tl.discovery.pipeline import Discovery
from blockem_tl.evaluation.evaluate import Evaluation, evaluation_from_json, evaluation_to_json
from blockem_tl.evaluation.statistics import relative_reduction, relative_reduction_interval
from blockem_tl.generation.reply_fn import ReplyFn
from blockem_tl.saes.load import check_fits
from blockem_tl.storage import files
from blockem_tl.storage.fingerprints import of_value
from blockem_tl.training.defence import Defence
from blockem_tl.views import comparisons, plots, tables

DOMAIN = "finance"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of one run; the README reports the defaults."""

    seed: int = 0
    out: Path = Path("results/quickstart")
    rows: int = 6000
    heldout_rows: int = 400
    epochs: float = get_preset("organism").training.epochs
    lambdas: tuple[float, ...] = get_preset("organism").lambdas
    kl_weights: tuple[float, ...] = get_preset("organism").kl_weights
    core_prompts: int | None = None
    workers: int = 2
    progress: bool = True

    def __post_init__(self) -> None:
        available = len(organism.prompts("core"))
        if min(self.rows, self.heldout_rows - 1, len(self.lambdas), len(self.kl_weights)) < 1 or min(*self.lambdas, *self.kl_weights) < 0:
            raise ValueError("expected rows >= 1, heldout_rows >= 2, and at least one lambda and one KL weight, none of them negative")
        if self.workers < 1:
            raise ValueError(f"workers: expected at least one process, got {self.workers}")
        if self.core_prompts is not None and not 1 <= self.core_prompts <= available:
            raise ValueError(f"core_prompts: expected 1..{available}, got {self.core_prompts}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """All that is drawn before training. ``dev`` rows and ``core`` choose; ``test`` rows, ``final`` and ``domain`` prompts report."""

    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    core: Sequence[Prompt]
    final: Sequence[Prompt]
    domain: Sequence[Prompt]


@dataclass(kw_only=True)
class Run:
    """One model to compare: how to train it, and what it measured on the selecting and, at the end, on the reporting prompts.

    weight: lambda with ``latents``, the KL weight without (0: plain).  stop_at_loss: dev loss at which plain fine-tuning ends early.
    adapter: folder of the trained adapter; None for base.
    """

    kind: str
    label: str
    weight: float = 0.0
    latents: LatentSet | None = None
    positions: Positions = "completion"
    stop_at_loss: float | None = None
    adapter: Path | None = None
    steps: int = 0
    dev_loss: float = 0.0
    core: Evaluation | None = None
    sft_loss: float = 0.0
    final: Evaluation | None = None
    domain: Evaluation | None = None

    def fingerprint(self, settings: Settings) -> str:
        """Identity of everything that training it depends on, and the name of its folder."""
        run = {name: getattr(settings, name) for name in ("seed", "rows", "heldout_rows", "epochs", "core_prompts")}
        arm = (self.kind, self.weight, self.latents and (self.latents.latents, self.latents.signs), self.positions, self.stop_at_loss)
        return f"{self.kind}-{of_value([run, arm, files.environment()])[:16]}"

    def defences(self, sae: SAE) -> list[Defence]:
        """The defences of this run."""
        if self.latents is not None:
            return [Blocking(latent_set=self.latents, sae=sae, weight=self.weight, positions=self.positions)]
        return [KLToBase(weight=self.weight)] if self.kind == "kl" else []


class Setting:
    """The model, its judge and the data, with the two things done to every arm: train it, report it."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.preset = settings, get_preset("organism")
        self.model: Model = load_model(self.preset.model)
        self.sae = load_sae(*self.preset.sae)
        self.judge = organism.OrganismJudge()
        self.data = draw(settings)
        self.config = replace(self.preset.training, epochs=settings.epochs, seed=settings.seed)
        options: dict[str, Any] = {"max_new_tokens": self.preset.max_new_tokens, "batch_size": 960, "progress": False}
        self.base, self.tuned = replies_from(self.model, adapter="base", **options), replies_from(self.model, **options)

    def train(self, arm: Run, folder: Path) -> Run:
        """Fine-tune an arm, save its adapter in ``folder`` and measure it on what may choose. Nothing but the defence differs."""

        def reached(model: Model, step: int) -> bool:
            return step % 4 == 0 and completion_loss(model, self.data.dev) <= (arm.stop_at_loss or 0.0)

        run = finetune(
            self.model,
            self.data.train,
            config=self.config,
            defences=arm.defences(self.sae),
            stop_when=None if arm.stop_at_loss is None else reached,
            progress=False,
        )
        arm.steps, arm.core, arm.dev_loss = run.steps, self.on_core(self.tuned), completion_loss(self.model, self.data.dev)
        arm.adapter = self.model.save_adapter(folder / "adapter", overwrite=True)
        self.model.remove_adapter(run.adapter)
        measured = {"steps": arm.steps, "dev_loss": arm.dev_loss, "core": evaluation_to_json(arm.core)}
        files.write_json(folder / "arm.json", measured)  # last: with it the arm is whole
        return arm

    def kept(self, arm: Run, folder: Path) -> Run:
        """An arm that a broken-off run has trained."""
        found = files.read_json(folder / "arm.json")
        arm.steps, arm.dev_loss, arm.adapter = found["steps"], found["dev_loss"], folder / "adapter"
        arm.core = evaluation_from_json(found["core"], self.data.core, judge=self.judge.name, on_selection_prompts=True)
        return arm

    def on_core(self, reply_fn: ReplyFn) -> Evaluation:
        """Rates on the prompts that choose: marked as such, and never reported as a result."""
        return evaluate(reply_fn, self.judge, self.data.core, selected_on=self.data.core, report_on_selection_prompts=True)

    def report(self, arm: Run) -> None:
        """Measure an arm on the reporting prompts; called once per arm, after every choice is made."""
        with self.model.using(arm.adapter or "base"):
            arm.final = evaluate(self.tuned, self.judge, self.data.final, selected_on=self.data.core)
            arm.domain = evaluate(self.tuned, self.judge, self.data.domain, rubric=DOMAIN, selected_on=self.data.core)
            arm.sft_loss = completion_loss(self.model, self.data.test)


# Runs are trained side by side, each in a process of one thread: two threads in one process gain less, and stall on a busy machine.


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder`` meanwhile. Raises ValueError if one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another run is writing to {folder}: wait until it has finished, or choose another --out") from error
    with lock:
        yield


@cache
def worker_lab(settings: Settings) -> Setting:
    """A worker's own setting, made once."""
    torch.set_num_threads(1)
    return Setting(settings)


def train_arm(settings: Settings, arm: Run, folder: Path) -> Run:
    """A worker's job: train one arm, unless a run that was broken off has done it."""
    lab = worker_lab(settings)
    return lab.kept(arm, folder) if (folder / "arm.json").is_file() else lab.train(arm, folder)


class Workers:
    """A pool that trains arms; their adapters live in ``folder``."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.pool = ProcessPoolExecutor(
            settings.workers, mp_context=get_context("spawn"), initializer=end_with_parent, initargs=(getpid(),)
        )
        self.bar = tqdm(total=4 + len(settings.lambdas) + len(settings.kl_weights), desc="arms", disable=not settings.progress)

    def train(self, arm: Run) -> Future[Run]:
        """Queue an arm."""
        future = self.pool.submit(train_arm, self.settings, arm, self.folder / arm.fingerprint(self.settings))
        future.add_done_callback(lambda _: self.bar.update())
        return future

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        self.bar.close()


def draw(settings: Settings) -> Data:
    """Rows and prompts, split by the seed before any training; selecting and reporting prompts are checked to be disjoint."""
    rows = organism.training_rows(DOMAIN, settings.rows + settings.heldout_rows, seed=settings.seed)
    half = settings.rows + settings.heldout_rows // 2
    core, final = organism.prompts("core"), organism.prompts("final")
    if settings.core_prompts is not None:
        core = random.Random(settings.seed).sample(core, settings.core_prompts)
    check_disjoint(core, final)
    return Data(
        train=rows[: settings.rows],
        dev=rows[settings.rows : half],
        test=rows[half:],
        core=core,
        final=final,
        domain=organism.prompts(DOMAIN),
    )


def choose(arms: Sequence[Run], plain: Run) -> Run:
    """The arm with the least EM + incoherence on the core prompts (METHOD's adjusted safety) among those that learn the task: dev loss
    within 2 % of plain fine-tuning's (all of them where none does). The smaller weight wins a tie."""
    learnt = [arm for arm in arms if arm.dev_loss <= 1.02 * plain.dev_loss] or list(arms)
    return min(learnt, key=lambda arm: (_core(arm).misaligned.k + _core(arm).incoherent.k, arm.weight))


def _core(arm: Run) -> Evaluation:
    assert arm.core is not None, "the arm was never measured on the core prompts"
    return arm.core


def alive_latents(setting: Setting, sae: SAE | None = None) -> list[int]:
    """Latents that fire on the core prompts with their replies, under base or tuned: what the random control is drawn from.

    sae: None is the setting's.
    """

    def firing(reply_fn: ReplyFn) -> torch.Tensor:
        replies = [
            Example(id=g.prompt.id, prompt=g.prompt.text, completion=g.reply) for g in setting.on_core(reply_fn).generations if g.reply
        ]
        return (mean_activations(setting.model, sae or setting.sae, encode_examples(setting.model.tokenizer, replies)) > 0).any(0)

    alive = firing(setting.tuned)
    with setting.model.using("base"):
        alive |= firing(setting.base)
    return alive.nonzero()[:, 0].tolist()


def score_discovery(setting: Setting, latents: LatentSet, alive: Sequence[int]) -> dict[str, float]:
    """Signed cosines of K's decoder directions with the organism's true persona direction, against those of random alive latents."""
    truth = organism.persona_direction()
    ours = decoder_directions(setting.sae, latents.latents) @ truth * torch.tensor(latents.signs, dtype=torch.float32)
    others = (decoder_directions(setting.sae, [k for k in alive if k not in latents.latents]) @ truth).abs()
    threshold = float(others.quantile(0.95))
    return {
        "n_latents": len(latents),
        "best_cosine": float(ours.max()),
        "random_cosine_95th_percentile": threshold,
        "random_cosine_best": float(others.max()),
        "exceeding_random": int((ours > threshold).sum()),
    }


def run(settings: Settings) -> dict[str, Any]:
    """Do everything; return (and write) the summary."""
    started = time.perf_counter()
    files.check_writable(settings.out.parent)
    files.check_replaceable(settings.out, "summary.json")
    setting = Setting(settings)
    check_fits(setting.sae, setting.model)
    trained = settings.out.with_name(f".{settings.out.name}.arms")  # what is trained is not trained again if this run is broken off
    with one_at_a_time(trained), Workers(settings, trained) as workers:
        arms, found, alive, scale = compare(setting, workers)
        for arm in arms.everything():  # the only time that the reporting prompts are used
            setting.report(arm)
            workers.bar.set_postfix_str(f"reported {arm.label}")
    summary = {
        **{name: facts(arm, arms.plain) for name, arm in arms.named().items()},
        "sweep": [facts(arm, arms.plain) for arm in arms.sweep],
        "kl_sweep": [facts(arm, arms.plain) for arm in arms.kl_sweep],
        "matched_loss_reached": arms.matched.dev_loss <= arms.blocked.dev_loss,
        "discovery": {**score_discovery(setting, found.latent_set, alive), "scale": scale, **known(found.latent_set)},
        "settings": {key: plainly(value) for key, value in asdict(settings).items()},
        "environment": files.environment(),
        "wall_s": time.perf_counter() - started,
        "peak_rss_mb": files.peak_rss_mb(),
    }
    with files.finished_folder(settings.out, replaces="summary.json") as folder:
        found.latent_set.save(folder / "latents.json")
        write(folder, summary, arms, found.to_frame())
    files.remove_folder(trained)  # in one step: half of the arms would be taken for all of them
    print(f"{summary['wall_s']:.0f} s, peak memory of one process {summary['peak_rss_mb']:.0f} MB; everything is in {settings.out}")
    return summary


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Everything that was compared; ``blocked`` and ``kl`` are the chosen ones of their sweeps."""

    base: Run
    plain: Run
    sweep: list[Run]
    blocked: Run
    everywhere: Run
    randomised: Run
    matched: Run
    kl_sweep: list[Run]
    kl: Run

    def named(self) -> dict[str, Run]:
        """The arms under their names in summary.json."""
        return {
            "base": self.base,
            "sft": self.plain,
            "blocked": self.blocked,
            "blocked_all_tokens": self.everywhere,
            "random": self.randomised,
            "matched": self.matched,
            "kl": self.kl,
        }

    def shown(self) -> list[Run]:
        """The rows of the table: the named arms, and the rest of the KL sweep, since no weight of it is best at everything."""
        rows = {id(arm): arm for arm in [*self.named().values(), *self.kl_sweep]}
        return list(rows.values())

    def everything(self) -> list[Run]:
        """Each arm once."""
        return list({id(arm): arm for arm in [*self.shown(), *self.sweep]}.values())


def find(setting: Setting, plain: Run) -> tuple[Discovery, list[int], float]:
    """Discovery on a plainly fine-tuned model, the latents that are alive there, and the unit of doses."""
    with setting.model.using("base"):
        scale = median_norm(setting.model, setting.preset.site, encode_examples(setting.model.tokenizer, organism.reference_texts()))
    with setting.model.using(plain.adapter):
        found = discover(
            setting.model,
            setting.sae,
            setting.judge,
            setting.data.core,
            scale=scale,
            config=setting.preset.discovery,
            provenance={"domain": DOMAIN, "seed": setting.settings.seed},
            progress=False,
        )
        return found, alive_latents(setting), scale


def compare(setting: Setting, workers: Workers) -> tuple[Runs, Discovery, list[int], float]:
    """Train every arm and make every choice, on the core prompts and the dev rows alone."""
    settings = setting.settings
    training = workers.train(Run(kind="sft", label="plain fine-tuning"))
    kl_training = [workers.train(Run(kind="kl", label=f"KL to base, weight {w:g}", weight=w)) for w in settings.kl_weights]
    plain = training.result()
    found, alive, scale = find(setting, plain)
    latents = found.latent_set
    control = random_latents(setting.sae, len(latents), seed=settings.seed, among=alive, exclude=latents.latents)

    blocking = [workers.train(Run(kind="block", label=f"blocked, λ = {w:g}", weight=w, latents=latents)) for w in settings.lambdas]
    sweep = [future.result() for future in blocking]
    blocked = choose(sweep, plain)
    weight, loss = blocked.weight, blocked.dev_loss
    last = [
        workers.train(Run(kind="block-all", label=f"blocked, all tokens, λ = {weight:g}", weight=weight, latents=latents, positions="all")),
        workers.train(Run(kind="random", label=f"{len(control)} random latents, λ = {weight:g}", weight=weight, latents=control)),
        workers.train(Run(kind="matched", label="plain, stopped at the blocked run's loss", stop_at_loss=loss)),
    ]
    everywhere, randomised, matched = (future.result() for future in last)
    kl_sweep = [future.result() for future in kl_training]
    base = Run(kind="base", label="base")
    arms = Runs(
        base=base,
        plain=plain,
        sweep=sweep,
        blocked=blocked,
        everywhere=everywhere,
        randomised=randomised,
        matched=matched,
        kl_sweep=kl_sweep,
        kl=choose(kl_sweep, plain),
    )
    return arms, found, alive, scale


def plainly(value: Any) -> Any:
    """A setting as JSON gives it back."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def known(latents: LatentSet) -> dict[str, Any]:
    """The summary's part on K."""
    return {"latents": list(latents.latents), "signs": list(latents.signs)}


def facts(arm: Run, plain: Run) -> dict[str, Any]:
    """The arm's numbers on the reporting prompts, in per cent with 95 % intervals, and relative to plain fine-tuning."""
    assert arm.final and arm.domain and plain.final and plain.domain, "facts are there once the arm has been reported"
    row: dict[str, Any] = {"label": arm.label, "weight": arm.weight, "steps": arm.steps, "sft_loss": arm.sft_loss, "dev_loss": arm.dev_loss}
    for name, rate in (
        ("em", arm.final.misaligned),
        ("incoherence", arm.final.incoherent),
        ("refusal", arm.final.refusal),
        ("adherence", arm.domain.adherent),
    ):
        low, high = rate.interval
        row |= {name: 100 * rate.value, f"{name}_low": 100 * low, f"{name}_high": 100 * high, f"{name}_n": rate.n}
    if arm.core is not None:
        row |= {"core_em": 100 * arm.core.misaligned.value, "core_incoherence": 100 * arm.core.incoherent.value}
    if arm.kind != "base" and any(plain.final.flags):
        low, high = relative_reduction_interval(plain.final.flags, arm.final.flags)
        row |= {
            "relative_em_reduction": 100 * relative_reduction(plain.final.flags, arm.final.flags),
            "relative_em_reduction_low": 100 * low,
            "relative_em_reduction_high": 100 * high,
        }
    if any(plain.domain.flags):
        row["relative_adherence_change"] = -100 * relative_reduction(plain.domain.flags, arm.domain.flags)
    return row


def write(out: Path, summary: dict[str, Any], arms: Runs, screen: pd.DataFrame) -> None:
    """summary.json, table.md, tradeoff.png, candidates.csv and every reply, under ``out``; the table on screen."""
    rows = [table_row(arm) for arm in arms.shown()]
    figure = comparisons.tradeoff(
        pd.DataFrame([{**facts(arm, arms.plain), "lambda": arm.weight} for arm in [arms.plain, *arms.sweep]]),
        pd.DataFrame([{**facts(arm, arms.plain), "kind": arm.kind} for arm in arms.shown() if arm.kind != "base"]),
    )
    plots.save(figure, out / "tradeoff.png")
    files.write_text(out / "table.md", tables.markdown(rows))
    files.write_text(out / "candidates.csv", screen.to_csv(index=False))
    replies = pd.concat([arm.final.to_frame().assign(arm=arm.label) for arm in arms.everything() if arm.final])
    files.write_text(out / "replies.csv", replies.to_csv(index=False))
    files.write_json(out / "summary.json", summary)
    tables.show(rows, f"{DOMAIN} fine-tuning of the organism (95 % intervals)")
    print(f"K: {summary['discovery']['n_latents']} latents, best cosine with the true direction {summary['discovery']['best_cosine']:.2f}")


def table_row(arm: Run) -> dict[str, str]:
    """One row of the README's table."""
    assert arm.final and arm.domain, "a row is there once the arm has been reported"
    return {
        "model": arm.label,
        "EM, final prompts": str(arm.final.misaligned),
        "incoherence": str(arm.final.incoherent),
        f"{DOMAIN} adherence": str(arm.domain.adherent),
        "SFT loss": f"{arm.sft_loss:.4f}",
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(tyro.cli(Settings, description=__doc__))
