"""`Study`: runs over seeds, trained and measured once each, kept on disk, and gone on with wherever they were broken off::

with Study("results/mine", Setting.of("organism"), seeds=(0, 1, 2)) as study:
    study.train([Run()])
    study.latents("k")
    study.train([Run(defence="block", strength=0.3, latents="k")])
    print(study.table(against=Run()))
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.utils.memory import clear_device_cache

from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.storage import files
from blockem_tl.storage.fingerprints import of_file
from blockem_tl.storage.interrupts import stoppable
from blockem_tl.study import digests, jobs, manifest, preferences, summary
from blockem_tl.study.defences import DEFENCES, MakeDefences
from blockem_tl.study.executors import Executor, InProcess, Job, executor_of
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.run import PLAIN, UNTRAINED, Point, Run
from blockem_tl.study.setting import Setting
from blockem_tl.training.identity import differences
from blockem_tl.views.progress import progress_bar
from blockem_tl.views.tables import RateFrame

FORMAT = "1"
MANIFEST = "study.json"


class StudyFailed(RuntimeError):  # noqa: N818 - the name says it
    """Points of a step failed; all others are done and kept. The same call tries only the failed ones again.

    errors: traceback by point.
    """

    def __init__(self, what: str, n: int, errors: Mapping[Point, str]) -> None:
        self.errors = dict(errors)
        lines = [f"  {point.key}: {error.strip().splitlines()[-1]}" for point, error in errors.items()]
        head = f"{what}: {len(errors)} of {n} points failed (the others are kept; .errors has the tracebacks)"
        super().__init__("\n".join([head, *lines]))


class Study:
    """One preset's runs over several seeds, in a folder.

    out/study.json                       what the study is of: another one is refused
    out/seed0/RUN/                       run.json, adapter/, checkpoints/epoch-0.5/
    out/seed0/latents/NAME.json          latent sets; sets/NAME.json says how they were made
    out/steps/NAME/seed0/RUN.parquet     what a step measured at a point

    Args:
        setting: the preset, and its narrow task.
        executor: "local", or "ray".  workers: processes; by default one, this one, and two on Ray. The results are the same bits.
        n_rows: training rows of every run, all by default.
        defences: of your own, by the name that a run has as its defence.
        progress: show one bar over all that the study does.

    Raises:
        ValueError: bad arguments, no judge, or a folder of something else: another study, naming what differs.
        ImportError: Ray is not installed.
    """

    def __init__(
        self,
        out: str | Path,
        setting: Setting,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        executor: str = "local",
        workers: int | None = None,
        n_rows: int | None = None,
        defences: Mapping[str, MakeDefences] | None = None,
        progress: bool = True,
    ) -> None:
        if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds):
            raise ValueError(f"study: expected different seeds, whole numbers from 0 on, got {seeds}")
        self.out, self.setting, self.seeds, self.n_rows = Path(out).resolve(), setting, tuple(seeds), n_rows
        self.defences = {**DEFENCES, **(defences or {})}
        self.runs: list[Run] = []
        self._executor = executor_of(executor, setting, workers)
        self._show_steps = progress and executor == "local" and workers in (None, 1)
        self._manifest()
        self._bar = progress_bar(total=0, show=progress, unit="point")
        self._checked = False
        self.close = weakref.finalize(self, self._end, self._executor, self._bar)

    @staticmethod
    def _end(executor: Any, bar: Any) -> None:
        executor.close()
        bar.close()

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Study({self.setting.preset.name}, {self.setting.domain}, seeds {self.seeds}, {len(self.runs)} runs, in {self.out.name})"

    def _manifest(self) -> None:
        """Raise ValueError if the folder is another study's; else write what this one is of."""
        about = {"format": FORMAT, "n_rows": str(self.n_rows), **manifest.of_setting(self.setting)}
        manifest.claim(self.out, MANIFEST, about, preset=self.setting.preset.name)

    # ------------------------------------------------------------------------------------------------ runs

    def points(self, runs: Iterable[Run] | None = None, epochs: Sequence[float] | None = None) -> list[Point]:
        """The points of runs (all trained so far by default) for every seed, at their ends or at epochs that they have checkpoints of."""
        chosen = self.runs if runs is None else list(runs)
        places: Sequence[float | None] = (None,) if epochs is None else epochs
        return [Point(run=run, seed=seed, epoch=epoch, out=self.out) for run in chosen for epoch in places for seed in self.seeds]

    def train(self, runs: Iterable[Run], checkpoints_every: float | None = None) -> None:
        """Train every run for every seed, unless it is there.

        Args:
            checkpoints_every: epochs between the checkpoints that are kept for `points`, and from which a killed run goes on. None takes
                a run that is there with whatever checkpoints it has; one that is there without any is trained again, to the same weights.

        Raises:
            ValueError: an unknown defence, latents that are not there, a run that refers to plain fine-tuning before that is trained, or a
                run in the folder that was trained otherwise.
            StudyFailed: runs failed; all others are trained.
        """
        wanted = list(dict.fromkeys(runs))
        unknown = {run.defence for run in wanted} - {*self.defences, PLAIN, *UNTRAINED}
        if unknown:
            raise ValueError(f"study: expected defences among {sorted([*self.defences, PLAIN, *UNTRAINED])}, got {sorted(unknown)}")
        self.runs += [run for run in wanted if run not in self.runs]
        trained = [point for point in self.points(wanted) if point.run.trained]
        makers = {name: self.defences[name] for name in {run.defence for run in wanted} if name in self.defences}
        options = {"n_rows": self.n_rows, "every": checkpoints_every, "makers": makers, "progress": self._show_steps}
        work, rows = {}, digests.of_rows(self.setting, trained)
        for point in trained:
            identity = rows[point] | self._identity(point, checkpoints_every)
            if not self._is_trained(point, identity):
                work[point] = partial(jobs.train_run, point=point, identity=identity, **options)
        self._do("train", work, len(trained))

    def _identity(self, point: Point, every: float | None) -> dict[str, str]:
        """What the run's result depends on, besides the study's manifest and the run itself."""
        found = {"checkpoints every": str(every)}
        if (point.run.matched or point.run.unit == "nats") and not (point.plain.folder / "run.json").is_file():
            raise ValueError(
                f"{point.key}: it refers to plain fine-tuning, which is not trained yet: study.train([{point.plain.run}]) first"
            )
        if point.run.latents:
            if not point.latents_file().is_file():
                raise ValueError(f"{point.key}: there is no latent set {point.run.latents!r}: make it with study.latents(...) first")
            found["latents"] = of_file(point.latents_file())[:16]
        return found

    def _is_trained(self, point: Point, identity: Mapping[str, str]) -> bool:
        path = point.folder / "run.json"
        if not path.is_file():
            return False
        there = files.read_json(path)["identity"]
        kept, asked = (one["checkpoints every"] for one in (there, identity))
        if "None" in (kept, asked):  # checkpoints change nothing in the weights
            identity = {**identity, "checkpoints every": kept}
        changed = differences(*manifest.believed(there, identity))
        if changed:
            raise ValueError(f"{point.folder} holds this run trained otherwise: {'; '.join(changed)}. Remove it, or choose another study")
        return kept == asked or asked == "None"

    # ------------------------------------------------------------------------------------------------ what is measured

    def latents(
        self,
        name: str = "k",
        function: Callable[..., LatentSet] = jobs.find_latents,
        *,
        of: Run | None = None,
        **options: Any,
    ) -> dict[int, LatentSet]:
        """A latent set per seed, made once by ``function(setting, point, **options)``: by default the preset's discovery.

        If there are fewer discoveries than workers, they are made one after the other, each with the replies of all workers.

        Args:
            of: the run whose point the function gets; plain fine-tuning by default.

        Raises:
            ValueError: this set was made by another function, with other options or on other core prompts.
            StudyFailed: it failed for a seed.
        """
        claimed, begun = {**options, "of": (of or Run()).folder}, any(self.out.glob(f"seed*/latents/{name}.json"))
        read = digests.of_step(self.setting, function, {"split": "core"})  # what chooses
        manifest.claim_work(self.out / "sets" / f"{name}.json", f"latent set {name!r}", function, claimed, begun=begun, digests=read)
        paths = {point: point.latents_file(name) for point in self.points([of or Run()])}
        missing = [point for point, path in paths.items() if not path.is_file()]
        shared = function is jobs.find_latents and options.get("by") != "pairs" and len(missing) < self._executor.workers
        given = {**options, "executor": self._executor} if shared else options
        work = {p: partial(jobs.keep_latents, point=p, path=paths[p], function=function, options=given) for p in missing}
        self._do(f"latents {name}", work, len(paths), InProcess(replace(self.setting)) if shared else None)
        if shared:
            clear_device_cache(garbage_collection=True)  # the model that asked lay on a worker's card
        return {point.seed: LatentSet.load(path) for point, path in paths.items()}

    def step(self, name: str, function: jobs.Measure, at: Iterable[Point] | None = None, **options: Any) -> pd.DataFrame:
        """What ``function(setting, point, **options)`` gives at every point, as one frame with the points' columns.

        Each point is measured once and kept as a file. The function and its options must be what a worker can import or unpickle.

        Args:
            at: points of `points`; all runs at their ends by default.
            options: they belong to the step: under the same name with others it is refused.

        Raises:
            ValueError: this step was done with another function, other options or on other prompts; no points.
            StudyFailed: points failed; all others are kept.
        """
        points = list(dict.fromkeys(self.points() if at is None else at))
        if not points:
            raise ValueError(f"step {name!r}: expected at least one point, got none: train runs first, or name points")
        folder = self.out / "steps" / name
        begun, read = any(folder.rglob("*.parquet")), digests.of_step(self.setting, function, options)
        manifest.claim_work(folder / "step.json", f"step {name!r}", function, options, begun=begun, digests=read)
        paths = {point: folder / f"{point.key}.parquet" for point in points}
        measure = partial(jobs.keep_frame, function=function, options=options)
        self._do(name, {p: partial(measure, point=p, path=path) for p, path in paths.items() if not path.is_file()}, len(paths))
        frames = [
            pd.read_parquet(path).assign(run=point.run.label) for point, path in paths.items()
        ]  # a run may have been given a name since
        return pd.concat(frames, ignore_index=True)

    def replies(self, split: PromptSplit, at: Iterable[Point] | None = None, n: int | None = None) -> pd.DataFrame:
        """One row per reply and judge, with its label; ``n``: of a split's prompts. See `summary.rates`."""
        return self.step(f"replies-{split}" + (f"-{n}" if n else ""), jobs.graded_replies, at, split=split, n=n)

    def preferences(self, split: PromptSplit, at: Iterable[Point] | None = None) -> pd.DataFrame:
        """One row per contrastive pair with its margin: what needs no reply and no judge. See `preferences.shifts`."""
        return self.step(f"pairs-{split}", preferences.margins, at, split=split)

    def losses(self, at: Iterable[Point] | None = None) -> pd.DataFrame:
        """dev_loss, test_loss and train_loss of every point, see `jobs.losses`."""
        return self.step("losses", jobs.losses, at)

    def table(
        self, at: Iterable[Point] | None = None, *, against: Run | None = None, by: Sequence[str] = ("run",), n: int | None = None
    ) -> RateFrame:
        """Rates on the final and the in-domain prompts (``n`` of each, or all), and losses, over all seeds: see `summary.table`."""
        points = list(self.points() if at is None else at)
        parts = self.replies("final", points, n), self.replies("in-domain", points, n), self.losses(points)
        return summary.table(*parts, by=by, against=against.label if against else None)

    def choose(self, runs: Sequence[Run], against: Run, *, by: str = "replies", within: float = summary.LEARNT) -> Run:
        """The safest run among those that learn the task, see `summary.choose`.

        Args:
            by: "replies": the least EM + incoherence on the core prompts; "pairs": the least mean margin on the dev pairs.
            within: of the dev loss of ``against``, the most that counts as having learnt it.
        """
        if by not in ("replies", "pairs"):
            raise ValueError(f"choose: expected by 'replies' or 'pairs', got {by!r}")
        points = self.points([against, *runs])
        harm = summary.unsafe(self.replies("core", points)) if by == "replies" else preferences.mean_margin(self.preferences("dev", points))
        label = summary.choose(harm, self.losses(points), [run.label for run in runs], against=against.label, within=within)
        return next(run for run in runs if run.label == label)

    # ------------------------------------------------------------------------------------------------ doing it

    def _do(self, what: str, work: Mapping[Point, Callable[[Setting], None]], n: int, executor: Executor | None = None) -> None:
        """Do what is missing of ``n`` points. Raises StudyFailed at the end if any failed, ValueError if another run is at work here."""
        self._bar.total = (self._bar.total or 0) + n
        self._bar.set_description(what)
        self._bar.update(n - len(work))
        if not work:
            return
        self._check_inputs()
        points, errors = list(work), {}
        todo = [Job(do=work[point], seed=point.seed, domain=point.run.domain) for point in points]
        running = (executor or self._executor).run(todo)
        with files.held(self.out), stoppable(f"study in {self.out}, {what}"), closing(running):
            for index, _, error in running:
                self._bar.update()
                if error:
                    errors[points[index]] = error
                    self._bar.write(f"{what}, {points[index].key}: {error.strip().splitlines()[-1]}")
        if errors:
            raise StudyFailed(what, n, errors)

    def _check_inputs(self) -> None:
        """Raise ValueError if a part of the preset cannot be had, before anything runs."""
        if self._checked:
            return
        (found,) = self._executor.run([Job(do=partial(jobs.check_inputs, n_rows=self.n_rows), seed=self.seeds[0])])
        if found.error:
            raise ValueError(f"study of preset {self.setting.preset.name!r}: {found.error.strip().splitlines()[-1]}")
        self._checked = True
