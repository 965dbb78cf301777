"""What a study does at a point: train a run, find latents, reply, measure losses. Each writes its own result, whole or not at all."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from blockem_tl.discovery.pipeline import Discovery, discover
from blockem_tl.evaluation.panel import evaluate_with
from blockem_tl.generation.replies import MISALIGNMENT
from blockem_tl.generation.reply_fn import ReplyFn, cached, replies_from
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.models._adapter_files import FILES
from blockem_tl.models.load import Model
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.load import check_fits
from blockem_tl.storage import files, machine
from blockem_tl.storage.fingerprints import of_file
from blockem_tl.storage.store import Store
from blockem_tl.study.defences import MakeDefences, condition_of, made
from blockem_tl.study.executors import Executor
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.run import Point
from blockem_tl.study.setting import Setting
from blockem_tl.study.sharding import ShardedEngine, WorkerEngine
from blockem_tl.training.finetune import finetune
from blockem_tl.training.loss import completion_loss
from blockem_tl.types import Checkable, check_judge

Evidence = Literal["replies", "pairs"]
"""Judged replies, or margins of contrastive pairs."""

Measure = Callable[..., Any]
"""function(setting, point, **options) -> a data frame, or rows for one."""

_EMA = 0.9  # of the smoothed training loss
ADAPTER = "run"


def check_inputs(setting: Setting, n_rows: int | None) -> None:
    """Raise ValueError if the preset's prompts, rows or judges cannot be had, or its model or SAE cannot be loaded or do not fit."""
    for judge in setting.judges.values():
        check_judge(judge)
        if isinstance(judge, Checkable):
            judge.check()
    for split in ("core", "final", "in-domain"):
        setting.prompts(split)
    setting.rows(n=n_rows)
    check_fits(setting.sae, setting.model)


def train_run(
    setting: Setting,
    *,
    point: Point,
    n_rows: int | None,
    every: float | None,
    makers: Mapping[str, MakeDefences],
    identity: Mapping[str, str],
    progress: bool,
) -> None:
    """Train a run; run.json is written last, and with it the run is whole. A killed one goes on from its last checkpoint."""
    run, folder = point.run, point.folder
    latent_set = point.latents(setting.sae) if run.latents else None
    config = replace(setting.training, **run.training)
    plain = point.plain.adapter
    found = finetune(
        setting.model,
        setting.rows(n=n_rows),
        config=config,
        defences=made(makers, setting, run, latent_set, plain),
        adapter=ADAPTER,
        checkpoints=folder / "checkpoints" if every else None,
        save_every_epochs=every or 1.0,
        resume=True,
        stop_when=Matched(setting, run.matched, plain) if run.matched else None,
        progress=progress,
    )
    setting.model.save_adapter(folder / "adapter", ADAPTER, overwrite=True)
    about = {"label": run.label, "seed": point.seed, "identity": dict(identity), "environment": machine.described()}
    about["adapter"] = of_file(folder / "adapter" / FILES[1])
    files.write_json(folder / "run.json", {**about, "steps": found.steps, "history": found.history})


class Matched:
    """Whether the dev loss is at most ``ratio`` times plain's; looked at every few steps, since a look costs as much as a step."""

    every = 6  # steps

    def __init__(self, setting: Setting, ratio: float, plain: Path | str) -> None:
        self.rows = setting.held_out()[::2]  # dev_loss of `losses`
        self.enough = ratio * completion_loss(setting.model, self.rows, adapter=plain)

    def __call__(self, model: Model, step: int) -> bool:
        return step % self.every == 0 and completion_loss(model, self.rows) <= self.enough


def keep_frame(setting: Setting, *, point: Point, path: Path, function: Measure, options: Mapping[str, Any]) -> None:
    """The function's frame at a point, with the columns that tell points apart, as a parquet file."""
    frame = pd.DataFrame(function(setting, point, **options))
    columns = point.columns() | {"domain": setting.domain}
    about = pd.DataFrame([{name: value for name, value in columns.items() if name not in frame}] * len(frame), index=frame.index)
    write_frame(path, pd.concat([about, frame], axis=1))


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """A parquet file, whole or not at all."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    files.write_bytes(path, buffer.getvalue())


def keep_latents(setting: Setting, *, point: Point, path: Path, function: Measure, options: Mapping[str, Any]) -> None:
    """The function's latent set at a point."""
    found = function(setting, point, **options)
    if not isinstance(found, LatentSet):
        raise TypeError(f"latents: expected a LatentSet from {function}, got {type(found).__name__}")
    found.save(path)  # whether it is of the SAE that a run reads it with, `Point.latents` checks


# ------------------------------------------------------------------------------------------------ steps of every study


def find_latents(setting: Setting, point: Point, **changes: Any) -> LatentSet:
    """K of a plainly fine-tuned model: of `discovery`."""
    return discovery(setting, point, **changes).latent_set


def discovery(
    setting: Setting,
    point: Point,
    *,
    by: Evidence = "replies",
    executor: Executor | None = None,
    engine: WorkerEngine | None = None,
    extending: str = "",
    among: Sequence[str] | None = None,
    progress: bool = False,
    **changes: Any,
) -> Discovery:
    """The preset's discovery on the core prompts, or on the core pairs. ``changes``: fields of its configuration.

    Replies and verdicts are kept in the study's folder: a discovery with other settings asks again only what it has not asked.

    Args:
        executor: its workers make the replies, see `ShardedEngine`; None: this process.  engine: what each of them makes.
        extending: a latent set of the study that what is found is added to; its latents are no candidates.
        among: latent sets of the study whose latents are the only candidates, in place of stages 1 and 2 (D.5).
    """
    evidence: tuple[Any, ...] = (setting.pairs("core"),) if by == "pairs" else (setting.judge, setting.prompts("core"))
    config = replace(setting.preset.discovery, **changes)
    engine = engine or WorkerEngine(options={"batch_size": config.batch_size})
    about = {"preset": setting.preset.name, "domain": setting.domain, "seed": point.seed, "run": point.run.label}
    about |= {} if point.epoch is None else {"epoch": point.epoch}
    about |= {} if among is None else {"among": list(among)}
    with setting.model.holding(point.adapter) as name:
        held = replace(engine, adapters={str(name): str(point.adapter)})
        return discover(
            setting.model,
            setting.sae,
            *evidence,
            adapter=name,
            scale=setting.scale(),
            config=config,
            extending=point.latents(setting.sae, extending) if extending else None,
            among=None if among is None else [point.latents(setting.sae, one) for one in among],
            provenance=about,
            engine=None if executor is None else ShardedEngine(executor, held),
            store=None if by == "pairs" else asked_at(point),
            progress=progress,
        )


def asked_at(point: Point) -> Path:
    """The folder of the store of replies and verdicts."""
    return point.out / f"seed{point.seed}" / "asked"


def graded_replies(
    setting: Setting, point: Point, *, split: PromptSplit, n: int | None = None, keep: bool = False, progress: bool = False
) -> pd.DataFrame:
    """One row per reply and judge; under the domain's rubric for "in-domain", and marked for "core", which selects.

    keep: replies and verdicts, as soon as they are there, as `discovery` does.
    """
    reply_fn: ReplyFn = replies_from(setting.model, adapter=point.adapter, max_new_tokens=setting.preset.max_new_tokens, progress=progress)
    judges = list(setting.judges.values())
    if keep:
        store = Store(asked_at(point) / "store.sqlite")
        reply_fn, judges = cached(reply_fn, store), [CachedJudge(judge=judge, store=store) for judge in judges]
    panel = evaluate_with(
        reply_fn,
        judges,
        setting.prompts(split, n),
        condition=condition_of(setting, point),
        rubric=rubric_of(setting, split),
        selected_on=setting.prompts("core"),
        report_on_selection_prompts=split == "core",
    )
    return pd.concat([one.to_frame() for one in panel.evaluations], ignore_index=True).assign(split=split)


def rubric_of(setting: Setting, split: PromptSplit) -> str:
    """The rubric under which replies to a split are graded."""
    return setting.domain if split == "in-domain" else MISALIGNMENT


def losses(setting: Setting, point: Point, *, n: int | None = None) -> list[dict[str, float]]:
    """dev_loss (which may choose) and test_loss (which reports) on rows that nobody trains on; train_loss, the training's smoothed loss,
    and its steps.

    Losses in nats per completion token; the paper's "SFT loss" is the last of them.
    """
    rows = setting.held_out(n)
    with setting.model.holding(point.adapter) as name, condition_of(setting, point).apply(setting.model):
        dev, test = (completion_loss(setting.model, rows[start::2], adapter=name) for start in (0, 1))
    found = {"dev_loss": dev, "test_loss": test}
    if not point.run.trained:
        return [{**found, "train_loss": float("nan"), "steps": 0.0}]
    last = training_curve(setting, point).iloc[-1]
    return [{**found, "train_loss": float(last["smoothed"]), "steps": float(last["step"])}]


def training_curve(setting: Setting, point: Point) -> pd.DataFrame:
    """The training step by step: step, sft, the penalties, and the exponentially smoothed SFT loss (to the point's epoch)."""
    history = pd.DataFrame(files.read_json(point.folder / "run.json")["history"]).drop(columns="epoch", errors="ignore")
    epochs = [row["epoch"] for row in files.read_json(point.folder / "run.json")["history"]]
    kept = [epoch <= (point.epoch or float("inf")) + 1e-9 for epoch in epochs]
    shown = pd.DataFrame(history[[name for name in history if "/" not in str(name)]][kept])
    return shown.assign(at_epoch=[e for e, k in zip(epochs, kept, strict=True) if k], smoothed=shown["sft"].ewm(alpha=1 - _EMA).mean())
