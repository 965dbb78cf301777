"""The stages of the method one by one, each into a folder of its own: an adapter, a latent set, rates, a patching sweep.

What is finished in a folder is read, not done again, and what was broken off goes on. A folder is of one thing: another preset, adapter,
seed or option is refused there by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from blockem_tl.models._adapter_files import FILES
from blockem_tl.models.lora import BASE
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.storage import files
from blockem_tl.storage.fingerprints import of_file, of_folder, of_value
from blockem_tl.study import digests, jobs, manifest, patching, preferences, summary
from blockem_tl.study.defences import DEFENCES, ON_LATENTS
from blockem_tl.study.executors import executor_of
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.page import Page
from blockem_tl.study.run import PLAIN, Point, Run
from blockem_tl.study.setting import Setting
from blockem_tl.study.sharding import WorkerEngine
from blockem_tl.types import Checkable, check_judge
from blockem_tl.views import plots, studies
from blockem_tl.views.tables import RateFrame

_JUDGED = (jobs.graded_replies, patching.patched_replies)


@dataclass(frozen=True, kw_only=True)
class Alone(Point):
    """A point whose folder is its own, and not a study's.

    place: the adapter's folder, or "base"; None: the one that is trained into ``out``.  card: the file of the latent set that it acts on.
    """

    place: Path | str | None = None
    card: Path | None = None

    @property
    def folder(self) -> Path:
        """``out``."""
        return self.out

    @property
    def adapter(self) -> Path | str:
        """What every ``adapter=`` takes."""
        return self.out / "adapter" if self.place is None else self.place

    def latents_file(self, name: str = "") -> Path:
        """``card``. Raises ValueError if there is none."""
        if self.card is None:
            raise ValueError(f"{self.run.label}: it has no latent set")
        return self.card


def adapter_at(place: Path | str) -> Alone:
    """The point of an adapter: "base", an adapter's folder, or the folder that `train_into` trained one into.

    Raises:
        ValueError: there is no adapter.
    """
    if str(place) == BASE:
        return Alone(run=Run(defence=BASE), place=BASE)
    for folder in (Path(place), Path(place) / "adapter"):
        if all((folder / name).is_file() for name in FILES):
            return Alone(run=Run(name=Path(place).resolve().name), place=folder)
    raise ValueError(f"expected the folder of an adapter, one that `blockem finetune` trained into, or {BASE!r}, got {str(place)!r}")


def tuned_at(place: Path | str) -> Alone:
    """As `adapter_at`, but base is refused too."""
    if (point := adapter_at(place)).place == BASE:
        raise ValueError(f"expected the adapter of a fine-tuned model, got {BASE!r}: nothing was fine-tuned there")
    return point


@contextmanager
def _into(out: Path, kind: str, setting: Setting, point: Alone, *, judged: bool = True, **about: Any) -> Iterator[Alone]:
    """Inside the block the point with ``out``, which is checked to be its own, and which no other process may write meanwhile.

    A folder into which nothing was made yet may be begun anew.
    """
    mine = {"seed": str(setting.seed), **manifest.of_setting(setting, judged=judged), **manifest.flat(about)}
    if point.place not in (None, BASE):
        mine["adapter"] = of_folder(point.adapter)[:16]
    name = f"{kind}.json"
    with files.held(files.check_writable(out)):
        if [entry.name for entry in out.iterdir() if not entry.name.startswith(".")] == [name]:
            (out / name).unlink()
        manifest.claim(out, name, mine, preset=setting.preset.name)
        yield replace(point, out=out.resolve(), seed=setting.seed)


def _measured(
    setting: Setting, point: Point, name: str, function: jobs.Measure, *, progress: bool | None = None, **options: Any
) -> pd.DataFrame:
    """What a step of a study gives at this point with these options, kept in its folder."""
    path = point.out / "steps" / f"{name}-{of_value(options)[:8]}.parquet"
    read = digests.of_step(setting, function, options)
    manifest.claim_work(path.with_suffix(".json"), name, function, options, begun=path.is_file(), digests=read)
    if not path.is_file():
        if function in _JUDGED:
            _check_judges(setting)
        asked = options if progress is None else {**options, "progress": progress}
        jobs.keep_frame(setting, point=point, path=path, function=function, options=asked)
    return pd.read_parquet(path)


def _check_judges(setting: Setting) -> None:
    for judge in setting.judges.values():
        check_judge(judge)
        if isinstance(judge, Checkable):
            judge.check()


# ------------------------------------------------------------------------------------------------ training and discovery


def train_into(
    out: Path,
    setting: Setting,
    run: Run,
    *,
    card: Path | None = None,
    n_rows: int | None = None,
    every: float = 0.5,
    progress: bool = True,
) -> Mapping[str, Any]:
    """Train a run: adapter/, run.json (written last; its contents come back), and checkpoints/.

    Args:
        card: the file of a latent set, for defences that act on latents: ``Run(latents=...)`` gives it a name.
        n_rows: training rows, all by default.
        every: epochs between checkpoints, from the last of which a killed training goes on.

    Raises:
        ValueError: an unknown defence, one without the latents that it needs or with latents that it does not read, another SAE's latents,
            or a folder of something else.
    """
    if run.defence not in {PLAIN, *DEFENCES}:
        raise ValueError(f"expected a defence among {sorted([PLAIN, *DEFENCES])}, got {run.defence!r}")
    if (run.defence in ON_LATENTS) != (card is not None):
        raise ValueError(f"defences that act on latents are {', '.join(ON_LATENTS)}: they need a latent set, and no other takes one")
    point = Alone(run=replace(run, latents=card.stem if card else ""), card=card)
    if card is not None and not (out / "run.json").is_file():
        LatentSet.load(card, setting.sae)
    about = {"run": asdict(point.run), "n_rows": n_rows, "every": every, "card": of_file(card)[:16] if card else None}
    (rows,) = digests.of_rows(setting, [replace(point, seed=setting.seed)]).values()
    with _into(out, "training", setting, point, judged=False, **about, **rows) as point:
        if not (out / "run.json").is_file():
            jobs.train_run(setting, point=point, n_rows=n_rows, every=every, makers=DEFENCES, identity={}, progress=progress)
        return files.read_json(out / "run.json")


def discover_into(
    out: Path,
    setting: Setting,
    place: Path | str,
    *,
    by: jobs.Evidence = "replies",
    executor: str = "local",
    workers: int | None = None,
    engine: WorkerEngine | None = None,
    progress: bool = True,
    **changes: Any,
) -> LatentSet:
    """K of a plainly fine-tuned model: latents.json, and the measurements that chose it in calibrated.csv, screened.csv and doses.csv.

    Args:
        place: as `adapter_at`.
        by: "replies", which are judged and kept one by one; or "pairs": margins of contrastive pairs, without a judge.
        executor, workers: as `Study`; with one worker here, this process makes the replies itself. The results are the same.
        engine: what makes the replies, in workers; by default TransformerLens.
        changes: fields of the configuration that change no latent: batch_size, smallest_wave.

    Raises:
        ValueError: no adapter there, no judge, no pairs, pairs for several workers, or a folder of something else.
        ImportError: Ray is not installed.
        NoLatents: none qualifies.
    """
    judged = by == "replies"
    shared = engine is not None or executor != "local" or workers not in (None, 1)
    if shared and not judged:
        raise ValueError("discovery by pairs asks for no replies that workers could share: leave out the executor, workers and engine")
    setting.prompts("core") if judged else setting.pairs("core")  # the files may not be there
    cards = int(engine.options.get("tensor_parallel_size", 1)) if engine else 1
    asked = executor_of(executor, replace(setting), workers, cards) if shared else None  # a copy, with a model of its own
    read = digests.of_step(setting, jobs.discovery, {"split": "core"})
    with _into(out, "discovery", setting, tuned_at(place), judged=judged, by=by, **read) as point:
        if not (out / "latents.json").is_file():
            if judged:
                _check_judges(setting)
            with closing(asked) if asked else nullcontext():
                found = jobs.discovery(setting, point, by=by, executor=asked, engine=engine, progress=progress, **changes)
            for name, frame in (("calibrated", found.to_frame()), ("screened", found.screen_frame()), ("doses", found.dose_frame())):
                files.write_text(out / f"{name}.csv", frame.to_csv(index=False))
            found.latent_set.save(out / "latents.json")
        return LatentSet.load(out / "latents.json")


# ------------------------------------------------------------------------------------------------ evaluation and patching


def evaluate_into(
    out: Path,
    setting: Setting,
    place: Path | str,
    *,
    splits: Sequence[PromptSplit] = ("final",),
    n: int | None = None,
    pairs: bool = False,
    progress: bool = True,
) -> dict[str, RateFrame]:
    """Replies with their labels, rates with intervals, and, if asked for, margins of pairs: for each split a table, by its name.

    Args:
        place: as `adapter_at`.
        n: of each split's prompts.
        pairs: also the margins of contrastive pairs, beside base's.

    Raises:
        ValueError: no adapter there, no judge, no pairs, or a folder of something else.
    """
    for split in splits:
        setting.prompts(split, n)
        _ = setting.pairs(split) if pairs else None
    tables: dict[str, RateFrame] = {}
    with _into(out, "evaluation", setting, adapter_at(place)) as point:
        for split in splits:
            asked = {"split": split, "n": n, "keep": True, "progress": progress}
            found = _measured(setting, point, f"replies-{split}", jobs.graded_replies, **asked)
            files.write_text(out / f"replies-{split}.csv", found.to_csv(index=False))
            tables[f"rates-{split}"] = summary.rates(found, by=["run", "judge"] if found["judge"].nunique() > 1 else ["run"])
            if pairs:
                tables[f"pairs-{split}"] = preferences.shifts(_margins(setting, point, split), against=point.run.label)
        page = Page(out)
        for name, table in tables.items():
            page.add(name, table)
        return tables


def _margins(setting: Setting, point: Alone, split: PromptSplit) -> pd.DataFrame:
    """The margins of the pairs under base and under the adapter."""
    ends = {BASE: replace(point, run=Run(defence=BASE), place=BASE), point.run.label: point}
    return pd.concat(_measured(setting, one, f"pairs-{split}-{name}", preferences.margins, split=split) for name, one in ends.items())


def patch_into(
    out: Path,
    setting: Setting,
    place: Path | str,
    *,
    by: jobs.Evidence = "replies",
    split: PromptSplit = "final",
    when: Sequence[patching.When] = ("prompt", "decode"),
    progress: bool = True,
    **options: Any,
) -> RateFrame:
    """A patching sweep of an adapter: the table and figure `patched`. Replies are kept site by site.

    Args:
        place: as `adapter_at`.
        by: "replies", which are judged; or "pairs": contrastive pairs, without a judge, at both times, base's states into the adapter's.
        options: sites, components, reverse and n of `patched_replies`.

    Raises:
        ValueError: no adapter there, no judge, no pairs, a site that cannot be patched, or a folder of something else.
    """
    if by == "pairs" and (unused := [name for name, value in options.items() if value and name != "sites"]):
        raise ValueError(f"patching by pairs takes sites, and no {', '.join(unused)}")
    _ = setting.prompts(split, options.get("n")) if by == "replies" else setting.pairs(split)
    with _into(out, "patching", setting, tuned_at(place), judged=by == "replies") as point:
        if by == "pairs":
            found = _measured(setting, point, "pairs", preferences.patched, split=split, sites=list(options.get("sites") or ()) or None)
            table = preferences.left(found, _margins(setting, point, split))
            figure = studies.shifts_along(table.dropna(subset=["block"]), "block", y="effect", panels="patched")
        else:
            asked = {"split": split, "progress": progress, **options}
            parts = [_measured(setting, point, f"patched-{one}", patching.patched_replies, when=one, **asked) for one in when]
            table = patching.patched_rates(pd.concat(parts, ignore_index=True))
            figure = plots.rates(table, by="site", direction=parts[0]["direction"].iloc[0])
        Page(out).add("patched", table, figure)
        return table
