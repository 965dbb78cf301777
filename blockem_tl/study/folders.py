"""What lies in a folder: a study, or stages of the method one beside the other; and what is missing there."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from blockem_tl.models.lora import BASE
from blockem_tl.study import manifest
from blockem_tl.study.run import PLAIN
from blockem_tl.study.study import FORMAT, MANIFEST

_Frame = Any
_STAGES = ("training", "discovery", "evaluation", "patching")
SCRIPTS = ("summary", "settings")  # what scripts leave that are no studies
_RESULTS = {"training": "run.json", "discovery": "latents.json", "evaluation": "rates-*.csv", "patching": "patched.csv"}
_REPLY = {"prompt_id", "prompt", "reply", "label"}
_KEYS = ("run", "domain", "epoch", "seed", "split", "pair", "prompt_id", "judge", "patched", "site")
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, OSError)
"""What reading a file that is broken, or another version's, may raise."""
_NAMED = 3  # of what is missing, so many are named


@dataclass(frozen=True, kw_only=True)
class Part:
    """The folder of a study or of a stage, by the kind of its manifest; ``name`` is for messages."""

    folder: Path
    kind: str
    name: str


def parts_of(run: Path) -> list[Part]:
    """The study in ``run`` or in study/ there, and the stages in ``run`` or in its folders.

    Raises:
        ValueError: there is neither.
    """
    places = [(run, kind) for kind in ("study", *_STAGES, *SCRIPTS)] + [(run / "study", "study")]
    places += [(folder, kind) for folder in sorted(run.glob("*")) for kind in _STAGES]
    found = [Part(folder=f, kind=kind, name=f.resolve().name) for f, kind in places if (f / f"{kind}.json").is_file()]
    if not found:
        known = ", ".join(f"{kind}.json" for kind in ("study", *_STAGES, *SCRIPTS))
        raise ValueError(f"expected the folder of a study, or of stages, or one that holds it (with one of {known}), got {run}")
    return found


def missing_in(part: Part) -> Iterator[str]:
    """A line for every run or stage that is not finished, and for what a study has for some of its seeds only."""
    result = _RESULTS.get(part.kind)
    if result and not any(part.folder.glob(result)):
        yield f"{part.name}: {part.kind} is not finished (there is no {result}): run the same command again"
    if part.kind != "study":
        return
    begun = {path.parent for name in ("adapter", "checkpoints") for path in part.folder.glob(f"seed*/*/{name}")}
    for run in sorted(run for run in begun if not (run / "run.json").is_file()):
        yield f"{run.relative_to(part.folder).as_posix()}: training is not finished: run the same study again"
    groups = {f"steps/{step.name}": (step, "*.parquet") for step in sorted(part.folder.glob("steps/*"))}
    groups |= {"latent sets": (part.folder, "latents/*.json"), "trained runs": (part.folder, "*/run.json")}
    # looked for where they are, not by a walk through everything: a study that still runs renames folders deeper inside
    seeds = sorted({path.name for place, _ in groups.values() for path in place.glob("seed*") if path.is_dir()})
    for what, (place, pattern) in groups.items():
        there = {seed: {_point(path) for path in (place / seed).glob(pattern)} for seed in seeds}
        everything = sorted(set().union(*there.values()))
        for seed, points in there.items():
            if absent := [point for point in everything if point not in points]:
                names = ", ".join(absent[:_NAMED]) + (", ..." if len(absent) > _NAMED else "")
                yield f"{what}: {len(absent)} of {len(everything)} are not there for {seed}: {names}"


def _point(path: Path) -> str:
    return path.parent.name if path.name == "run.json" else path.stem


# ------------------------------------------------------------------------------------------------ reading it


def present(found: Iterable[Any]) -> list[Any]:
    """What is not None."""
    return [one for one in found if one is not None]


class Folder:
    """What is there, read.

    about: each part's manifest.  measured: frames of steps, those of one kind as one: replies, patched, pairs, patched pairs, losses.
    missing: what is not there, or cannot be read, a line each.

    Raises:
        ValueError: as `parts_of`.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.parts = run, parts_of(run)
        self.missing = [line for part in self.parts for line in missing_in(part)]
        self.about = {part: self._about(part) for part in self.parts}
        self.measured = self._measured()

    def attempt(self, what: str | Path, function: Callable[..., Any], *given: Any) -> Any:
        """The function's result; None if it fails, which is noted."""
        try:
            return function(*given)
        except _BROKEN as error:
            name = what.relative_to(self.run).as_posix() if isinstance(what, Path) else what
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self.missing.append(f"{name} cannot be shown: {said[:200]}")
            return None

    def _about(self, part: Part) -> dict[str, str]:
        path = part.folder / f"{part.kind}.json"
        kept = self.attempt(path, manifest.read, path) or {}
        if part.kind == "study" and kept.get("format", FORMAT) != FORMAT:
            self.missing.append(f"{MANIFEST} is of format {kept['format']!r}, this version writes {FORMAT!r}: what can be read is shown")
        return manifest.flat(kept)

    def _measured(self) -> dict[str, _Frame]:
        found: dict[str, list[_Frame]] = {}
        adapters: dict[str, str] = {BASE: BASE}  # of stages, by the run's name
        for part in self.parts:
            adapter = self.about[part].get("adapter", "")
            for frame in present(self._frames(part)):
                run = str(frame["run"].iloc[0]) if "run" in frame and len(frame) else ""
                if part.kind != "study" and run != BASE and adapters.setdefault(run, adapter) != adapter:
                    frame = frame.assign(run=f"{part.name}: {run}")  # another adapter from a folder of the same name
                found.setdefault(_kind(frame), []).append(frame)
        joined = {kind: self.attempt(f"steps ({kind})", _joined, frames) for kind, frames in found.items() if kind}
        return {kind: frame for kind, frame in joined.items() if frame is not None}

    def _frames(self, part: Part) -> Iterator[_Frame | None]:
        """What the part's steps have measured, file by file."""
        steps = sorted((part.folder / "steps").rglob("*.parquet"))
        yield from (self.attempt(path, pd.read_parquet, path) for path in steps)
        if not any("patched" in path.relative_to(part.folder).as_posix() for path in steps):  # broken off: each site is kept by itself
            yield from (self.attempt(path, _one_site, path, part.folder) for path in sorted((part.folder / "patched").rglob("*.parquet")))
        if part.kind in SCRIPTS:
            yield from (self.attempt(path, _script_replies, path) for path in sorted(part.folder.glob("replies*.csv")))


def _kind(frame: _Frame) -> str:
    """What a step's frame holds, by its columns; "" for what a step of one's own measured."""
    columns = set(frame)
    if columns >= _REPLY:
        return "patched" if "site" in columns else "replies"
    if {"pair", "margin", "run"} <= columns:
        return "patched pairs" if "patched" in columns else "pairs"
    return "losses" if {"run", "dev_loss", "test_loss"} <= columns else ""


def _joined(frames: list[_Frame]) -> _Frame:
    """Each result once (stages measure base again), base first, then plain fine-tuning, then defence by defence by its strength."""
    frame: _Frame = pd.concat(frames, ignore_index=True)
    frame = frame.drop_duplicates([name for name in _KEYS if name in frame])
    if not {"defence", "strength"} <= set(frame):
        return frame
    rank = frame["defence"].map({BASE: 0, PLAIN: 1}).fillna(2)
    return frame.assign(rank=rank).sort_values(["rank", "defence", "strength"], kind="stable").drop(columns="rank")


def _one_site(path: Path, folder: Path) -> _Frame:
    """A site's replies, kept under patched/seed0/RUN/."""
    seed, run = path.relative_to(folder / "patched").parts[:2]
    return pd.read_parquet(path).assign(run=run, seed=int(seed.removeprefix("seed")))


def _script_replies(path: Path) -> _Frame:
    """Replies of a script that is no study, with its arms as runs."""
    frame: _Frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    given = {"run": frame.get("arm", frame.get("condition")), "seed": 0, "split": frame["prompt_id"].str.partition("-")[0]}
    return frame.assign(**{name: value for name, value in given.items() if name not in frame})
