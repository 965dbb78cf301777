"""`verify`: a sample of a finished study, computed anew and compared with what is stored."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from blockem_tl.discovery.attributing import pair_diff
from blockem_tl.discovery.diffing import shifts
from blockem_tl.evaluation.preference import preference
from blockem_tl.generation.reply_fn import replies_from
from blockem_tl.generation.steering import UNSTEERED
from blockem_tl.models._adapter_files import FILES
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.storage import files, machine
from blockem_tl.storage.fingerprints import of_file
from blockem_tl.study import jobs, manifest
from blockem_tl.study.defences import condition_of
from blockem_tl.study.run import PLAIN, Point, Run
from blockem_tl.study.setting import Setting
from blockem_tl.study.study import FORMAT, MANIFEST
from blockem_tl.training.identity import differences
from blockem_tl.types import Example
from blockem_tl.views.progress import progress_bar
from blockem_tl.views.results import Result

_Frame = Any
_EQUAL, _STEP = "equal", "step.json"
_KNOWN = ("graded_replies", "losses", "margins")
"""Functions of steps whose results are computed anew."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification(Result):
    """What was compared, row by row, and how this machine differs from those that the study was made on.

    rows: what, stored, recomputed, result ("equal", or by how much it differs), same.
    machine_changed: differences of versions and hardware.  hardware_known: whether the study names any, which older ones do not.
    not_checked: what is stored and was not looked at.
    """

    rows: list[dict[str, Any]]
    machine_changed: list[str]
    hardware_known: bool
    not_checked: list[str]

    @property
    def passed(self) -> bool:
        """Whether everything compared is the same."""
        return all(row["same"] for row in self.rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per comparison: what, stored, recomputed, result, same."""
        return pd.DataFrame(self.rows)

    def headline(self) -> str:
        """Numbers of comparisons and of differences, and what else is known."""
        wrong = sum(not row["same"] for row in self.rows)
        same = "same versions and hardware" if self.hardware_known else "same versions, on hardware that the study does not name"
        on = f"versions or hardware differ: {'; '.join(self.machine_changed)}" if self.machine_changed else same
        left = f"; not looked at: {', '.join(self.not_checked)}" if self.not_checked else ""
        return f"{len(self.rows)} compared, {wrong} differ; {on}{left}"

    def _shown(self) -> pd.DataFrame:
        """What differs, before what is equal."""
        return self.to_frame().sort_values("same", kind="stable").drop(columns="same")


@dataclass(frozen=True, kw_only=True)
class Found(Point):
    """A point of a study as it lies on disk; ``name`` is its run's folder."""

    name: str

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.out / f"seed{self.seed}" / self.name

    @property
    def plain(self) -> Point:
        """Plain fine-tuning of the same seed and task."""
        return Point(run=Run(domain=self.run.domain), seed=self.seed, out=self.out)


def study_at(out: Path | str) -> Path:
    """The folder of a study: ``out``, or study/ in it.

    Raises:
        ValueError: there is none, or its runs are not all finished.
    """
    for folder in (Path(out), Path(out) / "study"):
        if (folder / MANIFEST).is_file():
            begun = {path.parent for path in folder.glob("seed*/*/checkpoints")} | {path.parent for path in folder.glob("seed*/*/adapter")}
            unfinished = sorted(str(run.relative_to(folder)) for run in begun if not (run / "run.json").is_file())
            if unfinished:
                raise ValueError(f"{folder} is not finished: {', '.join(unfinished)}. Run the same study again, it goes on; then verify it")
            return folder
    raise ValueError(f"verify: expected the folder of a study, with {MANIFEST} in it or in study/, got {out}")


def verify(
    out: Path | str,
    setting: Setting,
    *,
    sample: int = 2,
    seed: int = 0,
    tolerance: float = 1e-4,
    judged: bool = True,
    progress: bool = True,
) -> Verification:
    """Compute a sample of a finished study anew. Nothing is written.

    Compared: the hash of every trained adapter; ``sample`` replies of every point of every set of replies, with their labels; the losses
    of one point; ``sample`` margins of one point of every set of pairs; the shifts of one latent set that was discovered.

    Args:
        out: the study's folder.  setting: of the preset that it was made with.
        seed: of the draw.
        tolerance: numbers are the same if they differ by no more than this part of themselves (1e-4: of other hardware, not of other
            weights); replies and labels have to be equal.
        judged: also grade the stored replies again.

    Raises:
        ValueError: no study, one that is not finished or in which nothing was measured, another preset's, or another version's.
    """
    if type(sample) is not int or sample < 1:
        raise ValueError(f"verify: expected a whole number as sample, at least 1, got {sample!r}")
    folder = study_at(out).resolve()
    kept = manifest.read(folder / MANIFEST)
    _check_manifest(folder, kept, setting, judged)
    steps = {path.parent: files.read_json(path) for path in sorted(folder.glob(f"steps/*/{_STEP}"))}
    if not any(folder.glob("steps/*/seed*/*.parquet")):
        raise ValueError(f"{folder}: nothing was measured there yet, so there is nothing to verify: run the study to its end first")
    check = _Check(folder, setting, sample, random.Random(seed), tolerance, judged)
    rows = [row for row in progress_bar(check.rows(steps), desc="verify", show=progress)]
    left = [step.name for step, about in steps.items() if about.get("function") not in _KNOWN]
    made_on, here = _made_on(folder, kept), machine.described()
    changed = list(dict.fromkeys(text for there in made_on for text in machine.changed(there, here)))
    known = any("processor" in there for there in made_on)
    return Verification(rows=rows, machine_changed=changed, hardware_known=known, not_checked=left)


def _check_manifest(folder: Path, kept: dict[str, Any], setting: Setting, judged: bool) -> None:
    if kept.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: expected a study in format {FORMAT}, got format {kept.get('format')!r}: another version of blockem_tl wrote it"
        )
    stored = {k: v for k, v in manifest.compared(kept).items() if k not in ("format", "n_rows") and (judged or not k.startswith("judge "))}
    changed = differences(stored, manifest.of_setting(setting, judged=judged))
    if changed:
        raise ValueError(f"{folder} was made otherwise than {setting.preset.name!r} says here: {'; '.join(changed)}")


def _made_on(folder: Path, kept: dict[str, Any]) -> list[dict[str, str]]:
    """The machines that the study and its runs were made on."""
    runs = [files.read_json(path).get("environment", {}) for path in sorted(folder.glob("seed*/*/run.json"))]
    return [*kept.get(manifest.MACHINES, []), *runs]


class _Check:
    """The comparisons of one verification."""

    def __init__(self, folder: Path, setting: Setting, sample: int, draw: random.Random, tolerance: float, judged: bool) -> None:
        self.folder, self.setting, self.sample, self.draw, self.tolerance, self.judged = folder, setting, sample, draw, tolerance, judged

    def rows(self, steps: dict[Path, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """All comparisons, cheap ones first."""
        yield from self._adapters()
        for step, about in steps.items():
            places, function = sorted(step.glob("seed*/*.parquet")), about.get("function")
            if function == "graded_replies":
                for place in places:
                    yield from self._replies(place)
            elif function == "losses" and places:
                yield from self._losses(self.draw.choice(places), about)
            elif function == "margins" and places:
                yield from self._margins(self.draw.choice(places))
        yield from self._shifts()

    # -------------------------------------------------------------------------------------------- one kind each

    def _adapters(self) -> Iterator[dict[str, Any]]:
        """The trained weights against the hash in run.json, which older studies do not have."""
        for path in sorted(self.folder.glob("seed*/*/run.json")):
            stored, weights = files.read_json(path).get("adapter"), path.parent / "adapter" / FILES[1]
            if stored:
                found = of_file(weights) if weights.is_file() else "absent"
                yield self._row(f"adapter of {path.parent.relative_to(self.folder)}", stored[:16], found[:16])

    def _replies(self, place: Path) -> Iterator[dict[str, Any]]:
        frame, point, setting = self._read(place)
        split = str(frame["split"].iloc[0])
        asked = {prompt.id: prompt for prompt in setting.prompts(split)}  # pyright: ignore[reportArgumentType] - a split's name
        ids = self._drawn(place, list(dict.fromkeys(frame["prompt_id"])), asked)
        reply_fn = replies_from(setting.model, adapter=point.adapter, max_new_tokens=setting.preset.max_new_tokens, progress=False)
        again = reply_fn([asked[name] for name in ids], [condition_of(setting, point)])
        by_judge = {name: part.set_index("prompt_id") for name, part in frame.groupby("judge")}
        first = next(iter(by_judge.values()))
        for name, generation in zip(ids, again, strict=True):
            yield self._row(f"reply to {name}, {self._key(place)}", str(first.loc[name, "reply"]), generation.reply)
        for judge in setting.judges.values() if self.judged else ():
            stored, prompts = by_judge[judge.name].loc[ids], [asked[name] for name in ids]
            verdicts = judge.grade(prompts, list(stored["reply"]), rubric=jobs.rubric_of(setting, split))  # pyright: ignore[reportArgumentType]
            for name, verdict in zip(ids, verdicts, strict=True):
                yield self._row(f"label of {name} by {judge.name}, {self._key(place)}", stored.loc[name, "label"], verdict.label)

    def _losses(self, place: Path, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
        frame, point, setting = self._read(place)
        n = json.loads(about.get("n", "null"))
        for name, value in jobs.losses(setting, point, n=n)[0].items():
            yield self._row(f"{name}, {self._key(place)}", float(frame[name].iloc[0]), value)

    def _margins(self, place: Path) -> Iterator[dict[str, Any]]:
        frame, point, setting = self._read(place)
        pairs = {pair.id: pair for pair in setting.pairs(str(frame["split"].iloc[0]))}  # pyright: ignore[reportArgumentType] - a split's name
        ids, stored = self._drawn(place, list(frame["pair"]), pairs), frame.set_index("pair")["margin"]
        found = preference(
            setting.model, [pairs[i] for i in ids], adapter=point.adapter, conditions=[condition_of(setting, point)], progress=False
        )
        for name, value in zip(ids, found.margins[0], strict=True):
            yield self._row(f"margin of {name}, {self._key(place)}", float(stored[name]), float(value))

    def _shifts(self) -> Iterator[dict[str, Any]]:
        """Of one set that discovery found on plain fine-tuning."""
        sets = {path: LatentSet.load(path) for path in sorted(self.folder.glob("seed*/latents/*.json"))}
        discovered = [p for p, one in sets.items() if one.provenance.get("method") == "discovery" and one.provenance.get("run") == PLAIN]
        if not discovered:
            return
        path = self.draw.choice(discovered)
        latent_set, number = sets[path], int(path.parent.parent.name.removeprefix("seed"))
        latent_set.check_sae(self.setting.sae)
        found = self._all_shifts(latent_set, number)
        for latent, shift in zip(latent_set.latents, latent_set.shifts, strict=True):
            yield self._row(f"shift of latent {latent}, {path.relative_to(self.folder)}", shift, float(found[latent]))

    def _all_shifts(self, latent_set: LatentSet, number: int) -> Any:
        setting, about = self.setting.at(seed=number), latent_set.provenance
        plain = Point(run=Run(), seed=number, out=self.folder)
        if about["judge"] == "contrastive pairs":
            return pair_diff(setting.model, setting.sae, setting.pairs("core"), adapter=plain.adapter, progress=False).shift
        core, config = setting.prompts("core"), about["config"]
        with setting.model.using(plain.adapter):
            rows: Sequence[Any] = core
            if config["read"] == "replies":
                replies = replies_from(setting.model, max_new_tokens=config["max_new_tokens"], progress=False)(core, [UNSTEERED])
                rows = [
                    Example(id=g.prompt.id, prompt=g.prompt.text, completion=g.reply, system=g.prompt.system) for g in replies if g.reply
                ]
            return shifts(setting.model, setting.sae, rows)

    # -------------------------------------------------------------------------------------------- shared

    def _read(self, place: Path) -> tuple[_Frame, Found, Setting]:
        """What a step stored at a point, the point, and its setting."""
        frame: _Frame = pd.read_parquet(place)
        number, (name, _, epoch) = place.parent.name.removeprefix("seed"), place.name.removesuffix(".parquet").partition("@")
        row = frame.iloc[0]
        domain = "" if row["domain"] == self.setting.domain else str(row["domain"])
        run = Run(
            defence=row["defence"],
            strength=float(row["strength"]),
            unit=row["unit"],
            latents=row["latents"],
            domain=domain,
            overrides=json.loads(row["overrides"]),
        )
        point = Found(run=run, seed=int(number), epoch=float(epoch) if epoch else None, out=self.folder, name=name)
        return frame, point, self.setting.at(seed=point.seed, domain=domain)

    def _drawn(self, place: Path, ids: list[str], known: dict[str, Any]) -> list[str]:
        """A few of the stored ids. Raises ValueError if the preset's data have them no longer."""
        lost = [name for name in ids if name not in known]
        if lost:
            raise ValueError(f"{self._key(place)}: the preset's data no longer have {lost[:3]}: they are another version's")
        return self.draw.sample(ids, min(self.sample, len(ids)))

    def _key(self, place: Path) -> str:
        return str(place.relative_to(self.folder / "steps")).removesuffix(".parquet")

    def _row(self, what: str, stored: Any, found: Any) -> dict[str, Any]:
        same, result = stored == found, _EQUAL
        if isinstance(stored, float) and isinstance(found, float):
            exact = stored == found or (math.isnan(stored) and math.isnan(found))
            same = exact or math.isclose(stored, found, rel_tol=self.tolerance, abs_tol=self.tolerance / 100)
            result = _EQUAL if exact else f"differs by {abs(stored - found):.2g}" + (" (within tolerance)" if same else "")
        elif not same:
            result = "differs"
        return {"what": what, "stored": stored, "recomputed": found, "result": result, "same": same}
