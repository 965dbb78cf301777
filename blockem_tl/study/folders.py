"""What lies in a folder: a study, or stages of the method one beside the other; and what is missing there."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STAGES = ("training", "discovery", "evaluation", "patching")
_SCRIPTS = ("summary", "settings")  # what scripts leave that are no studies
_RESULTS = {"training": "run.json", "discovery": "latents.json", "evaluation": "rates-*.csv", "patching": "patched.csv"}
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
    places = [(run, kind) for kind in ("study", *_STAGES, *_SCRIPTS)] + [(run / "study", "study")]
    places += [(folder, kind) for folder in sorted(run.glob("*")) for kind in _STAGES]
    found = [Part(folder=f, kind=kind, name=f.resolve().name) for f, kind in places if (f / f"{kind}.json").is_file()]
    if not found:
        known = ", ".join(f"{kind}.json" for kind in ("study", *_STAGES, *_SCRIPTS))
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
    seeds = sorted({path.name for path in part.folder.rglob("seed*") if path.is_dir()})
    for what, (place, pattern) in groups.items():
        there = {seed: {_point(path) for path in (place / seed).glob(pattern)} for seed in seeds}
        everything = sorted(set().union(*there.values()))
        for seed, points in there.items():
            if absent := [point for point in everything if point not in points]:
                names = ", ".join(absent[:_NAMED]) + (", ..." if len(absent) > _NAMED else "")
                yield f"{what}: {len(absent)} of {len(everything)} are not there for {seed}: {names}"


def _point(path: Path) -> str:
    return path.parent.name if path.name == "run.json" else path.stem
