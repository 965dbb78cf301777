"""`write_report`: what lies in the folder of a study, or of stages of the method, as one HTML file. What cannot be read is named."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from blockem_tl.models.lora import BASE
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.storage import files
from blockem_tl.study import manifest, patching, preferences, summary
from blockem_tl.study.folders import Part, missing_in, parts_of
from blockem_tl.study.page import cells
from blockem_tl.study.run import PLAIN
from blockem_tl.study.study import FORMAT, MANIFEST
from blockem_tl.views import plots, studies
from blockem_tl.views.report import Section, page

_Frame = Any
_REPLY = {"prompt_id", "prompt", "reply", "label"}
_COLUMNS = ["split", "prompt_id", "category", "prompt", "run", "seed", "reply"]
_BY = ("run", "domain", "epoch")
_ABOUT = ["defence", "strength", "latents", "overrides"]
_RATES = ("misaligned", "incoherent", "adherent", "prefers_harm", "removed")
_BROKEN = (ValueError, KeyError, TypeError, AttributeError, OSError)
"""What reading a file that is broken, or another version's, may raise."""


def write_report(run: Path | str, to: Path | str | None = None) -> tuple[Path, list[str]]:
    """Write the report, to report.html in ``run`` by default; its path, and what is missing in the folder.

    Raises:
        ValueError: no study there, or a place that cannot be written; before anything is read.
    """
    run = Path(run)
    parts, target = parts_of(run), Path(to) if to is not None else run / "report.html"
    if target.is_dir():
        raise ValueError(f"report: expected the name of a file to write, got the folder {target}")
    files.check_writable(target.parent)
    reader = Reader(run, parts)
    preset = reader.about[0].get("preset", "") if reader.about else ""
    text = page(
        f"{run.resolve().name}: {preset}" if preset else run.resolve().name, reader.sections(), reader.replies(), missing=reader.missing
    )
    return files.write_text(target, text), reader.missing


class Reader:
    """Reads what is there; ``missing`` collects what is not, or cannot be read."""

    def __init__(self, run: Path, parts: Sequence[Part]) -> None:
        self.run, self.parts, self.missing = run, list(parts), [line for part in parts for line in missing_in(part)]
        self.about = self._all(self._about(part) for part in parts)
        self.measured = self._measured()

    def _try(self, what: str | Path, function: Callable[..., Any], *given: Any) -> Any:
        """The function's result; None if it fails, which is noted."""
        try:
            return function(*given)
        except _BROKEN as error:
            name = what.relative_to(self.run).as_posix() if isinstance(what, Path) else what
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self.missing.append(f"{name} cannot be shown: {said[:200]}")
            return None

    @staticmethod
    def _all(found: Iterable[Any]) -> list[Any]:
        return [one for one in found if one is not None]

    # -------------------------------------------------------------------------------------------- what is there

    def _about(self, part: Part) -> dict[str, str] | None:
        path = part.folder / f"{part.kind}.json"
        kept = self._try(path, manifest.read, path)
        if kept is not None and part.kind == "study" and kept.get("format") != FORMAT:
            self.missing.append(
                f"{MANIFEST} is of format {kept.get('format')!r}, this version writes {FORMAT!r}: what can be read is shown"
            )
        return None if kept is None else {"folder": part.name, **manifest.flat(kept)}

    def _measured(self) -> dict[str, _Frame]:
        """All frames of steps, those of one kind as one: replies, patched replies, pairs, losses."""
        found: dict[str, list[_Frame]] = {}
        for part in self.parts:
            steps = {path: self._try(path, pd.read_parquet, path) for path in sorted((part.folder / "steps").rglob("*.parquet"))}
            if not any("patched" in str(path.relative_to(part.folder)) for path in steps):  # broken off: sites are kept one by one
                steps |= {
                    path: self._try(path, _one_site, path, part.folder) for path in sorted((part.folder / "patched").rglob("*.parquet"))
                }
            if part.kind in ("summary", "settings"):
                steps |= {path: self._try(path, _script_replies, path) for path in sorted(part.folder.glob("replies*.csv"))}
            for frame in self._all(steps.values()):
                found.setdefault(_kind(frame), []).append(frame)
        return {kind: _ordered(pd.concat(frames, ignore_index=True)) for kind, frames in found.items()}

    # -------------------------------------------------------------------------------------------- sections

    def sections(self) -> list[Section]:
        """What is shown above the replies."""
        latents = self._latents()
        frames = self._summary()
        tables = {name: cells(frame.drop(columns=_ABOUT, errors="ignore")) for name, frame in frames.items()}
        figures = {
            k: v for name, frame in frames.items() for k, v in (self._try(f"figures of {name}", _tradeoff, frame, name) or {}).items()
        }
        history = self._histories()
        curves = {} if history is None else {"Loss and weighted penalty, means over seeds": studies.training(_plain(history))}
        last = {} if history is None else {"Last step": cells(history.groupby(["run", "seed"], sort=False).last().reset_index())}
        swept, shown = self._patched()
        pages, own = self._pages()
        return [
            Section(title="Summary", tables=tables, none="Nothing was measured yet: no replies, no pairs."),
            Section(title="Trade-off", figures=figures, none="There are no rates to draw."),
            Section(title="Latents", tables=latents, none="There is no latent set: `blockem discover` makes one, or Study.latents."),
            Section(title="Training", figures=curves, tables=last, none="No training is finished."),
            Section(title="Patching", figures=shown, tables=swept, none="There is no patching sweep: `blockem patch` makes one."),
            Section(title="Tables and figures of the run", figures=own, tables=pages, folded=True, none="The folder has none of its own."),
            Section(title="About", tables={"What each folder is of": self._facts()}, folded=True, none=""),
        ]

    def _facts(self) -> list[dict[str, str]]:
        return [
            {"folder": one["folder"], "what": name, "value": text} for one in self.about for name, text in one.items() if name != "folder"
        ]

    def _summary(self) -> dict[str, _Frame]:
        """Rates split by split, and preferences between pairs, beside the runs' losses."""
        found, losses = {}, self.measured.get("losses")
        for kind, make in (("replies", _rates), ("pairs", _shares)):
            for split, rows in self.measured.get(kind, pd.DataFrame({"split": []})).groupby("split", sort=False):
                name = f"{kind.capitalize()}, {split} prompts"
                frame = self._try(name, make, rows, losses)
                found |= {} if frame is None else {name: frame}
        final, task = (found.get(f"Replies, {split} prompts") for split in ("final", "in-domain"))
        if final is not None and task is not None:  # what the runs have learnt belongs beside what they do
            by = [name for name in _BY if name in final and name in task]
            found["Replies, final prompts"] = final.merge(
                task[[*by, *(name for name in task if name.startswith("adherent"))]], on=by, how="left"
            )
        return found

    def _latents(self) -> dict[str, list[dict[str, str]]]:
        found = {}
        for part in self.parts:
            for path in sorted([*part.folder.glob("seed*/latents/*.json"), *part.folder.glob("latents.json")]):
                if (latents := self._try(path, LatentSet.load, path)) is not None:
                    found[f"{path.relative_to(self.run)}: {latents.headline()}"] = cells(latents.to_frame())
        return found

    def _histories(self) -> _Frame | None:
        paths = [path for part in self.parts for path in sorted([*part.folder.glob("run.json"), *part.folder.glob("seed*/*/run.json")])]
        frames = self._all(self._try(path, _history, path) for path in paths)
        return pd.concat(frames, ignore_index=True) if frames else None

    def _patched(self) -> tuple[dict[str, list[dict[str, str]]], dict[str, Any]]:
        tables, figures = {}, {}
        found = self.measured.get("patched", pd.DataFrame({"split": [], "run": []}))
        for (split, run), rows in found.groupby(["split", "run"], sort=False):
            name = f"{run}, {split} prompts"
            frame = self._try(f"patching of {name}", patching.patched_rates, rows)
            if frame is not None:
                tables[name] = cells(frame)
                figures[name] = plots.rates(_plain(frame), by="site", direction=" and ".join(rows["direction"].unique()))
        return tables, figures

    def _pages(self) -> tuple[dict[str, list[dict[str, str]]], dict[str, bytes]]:
        """The tables and figures that the run's own script or command wrote."""
        folders = dict.fromkeys([self.run, *(part.folder for part in self.parts)])
        csvs = [path for folder in folders for path in sorted(folder.glob("*.csv")) if not path.name.startswith("replies")]
        tables = {path: self._try(path, lambda path: cells(pd.read_csv(path)), path) for path in csvs}
        figures = {path: self._try(path, path.read_bytes) for folder in folders for path in sorted(folder.glob("*.png"))}
        named = [{str(path.relative_to(self.run)): made for path, made in those.items() if made} for those in (tables, figures)]
        return named[0], named[1]

    def replies(self) -> _Frame:
        """One row per reply, patched ones too, with every judge's label: what `views.report.page` takes."""
        found = self._all(self._try(f"replies ({kind})", _browsed, self.measured.get(kind)) for kind in ("replies", "patched"))
        if not found:
            return pd.DataFrame(columns=[*_COLUMNS, "labels"])
        rows = pd.concat(found, ignore_index=True)
        wide = rows.drop_duplicates([*_COLUMNS, "judge"]).pivot(index=_COLUMNS, columns="judge", values="label").fillna("")
        shown = wide.index.to_frame(index=False).assign(labels=list(wide.itertuples(index=False, name=None)))
        order = {name: i for i, name in enumerate(dict.fromkeys(rows["run"]))}
        shown = shown.sort_values(["split", "prompt_id", "run", "seed"], key=lambda part: part.map(order) if part.name == "run" else part)
        shown.attrs["judges"] = list(map(str, wide.columns))
        return shown


# ------------------------------------------------------------------------------------------------ frames


def _kind(frame: _Frame) -> str:
    """What a step's frame holds, by its columns; "" for what a step of one's own measured."""
    columns = set(frame)
    if columns >= _REPLY:
        return "patched" if "site" in columns else "replies"
    if {"pair", "margin", "run"} <= columns:
        return "" if "patched" in columns else "pairs"
    return "losses" if {"run", "dev_loss", "test_loss"} <= columns else ""


def _ordered(frame: _Frame) -> _Frame:
    """Base first, then plain fine-tuning, then defence by defence by its strength."""
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


def _browsed(found: _Frame | None) -> _Frame | None:
    """The rows with their runs named so that epochs, domains and patches are told apart."""
    if found is None:
        return None
    run: _Frame = found["run"].astype(str)
    if found.get("domain", pd.Series(dtype=str)).nunique() > 1:
        run = found["domain"].astype(str) + ": " + run
    if "epoch" in found:
        run = run + [f" @ {epoch:g}" if pd.notna(epoch) else "" for epoch in found["epoch"]]
    if "site" in found:
        run = run + ", " + found["patched"].astype(str) + [f" {site}" if site != "unpatched" else "" for site in found["site"].astype(str)]
    texts = {name: found[name].fillna("").astype(str) for name in ("split", "prompt_id", "category", "prompt", "reply", "label", "judge")}
    return pd.DataFrame({**texts, "run": run, "seed": found["seed"].astype(int)})


def _rates(rows: _Frame, losses: _Frame | None) -> _Frame:
    """Rates of a split by run, epoch and domain, as far as they vary, beside what the runs are and their losses' means."""
    by = [name for name in _BY if name == "run" or (name in rows and rows[name].nunique(dropna=False) > 1)]
    return _beside(summary.rates(rows, by=by), rows, losses, by)


def _shares(rows: _Frame, losses: _Frame | None) -> _Frame:
    """`preferences.shifts` against plain fine-tuning, or of one run alone; base has to be there."""
    found = rows[rows["epoch"].isna()]
    tuned = [run for run in found["run"].unique() if run != BASE]
    return _beside(preferences.shifts(found, against=tuned[0] if len(tuned) == 1 else PLAIN), found, losses, ["run"])


def _beside(frame: _Frame, rows: _Frame, losses: _Frame | None, by: list[str]) -> _Frame:
    about = [name for name in _ABOUT if name in rows]
    made = frame.merge(rows[[*by, *about]].drop_duplicates(by), on=by, how="left") if about else frame
    if losses is None:
        return made
    means = losses.groupby(by, sort=False, dropna=False)[["dev_loss", "test_loss"]].mean().reset_index()
    return made.merge(means, on=by, how="left")


def _tradeoff(frame: _Frame, name: str) -> dict[str, Any]:
    """Rates along the strength of each defence, or run beside run; and the first rate over the loss."""
    ends = _plain(frame[frame["epoch"].isna()] if "epoch" in frame else frame)
    columns = [column for column in _RATES if f"{column}_low" in ends and ends[column].notna().any()]
    if not columns or ends.empty:
        return {}
    ends = ends.assign(run=ends["domain"] + ": " + ends["run"]) if "domain" in ends else ends
    figures = {f"{name}, run by run": studies.side_by_side(ends, columns=columns)} if len(ends) <= 24 else {}
    for family, rows in _families(ends):
        figures[f"{name}, along the strength of {family}"] = studies.along(rows, "strength", columns=columns)
    if ends.get("test_loss", pd.Series(dtype=float)).notna().any():
        figures[f"{name}, against the task learnt"] = studies.tradeoff(ends, columns[-1] if "removed" in columns else columns[0])
    return figures


def _families(ends: _Frame) -> Iterator[tuple[str, _Frame]]:
    """Runs that differ in their strength alone, each with plain fine-tuning as strength 0; only where there are two strengths."""
    if "strength" not in ends or "domain" in ends:
        return
    ends = ends.assign(test_loss=ends.get("test_loss", float("nan")))
    for key, rows in ends[ends["strength"] > 0].groupby(["defence", "latents", "overrides"], sort=False):
        if rows["strength"].nunique() == len(rows) > 1:
            yield ", ".join(part for part in map(str, key) if part not in ("", "{}")), pd.concat([ends[ends["run"] == PLAIN], rows])


def _history(path: Path) -> _Frame:
    """A training's steps: run, seed, step, loss, sft, smoothed."""
    kept: Mapping[str, Any] = files.read_json(path)
    frame: _Frame = pd.DataFrame(kept["history"])[["step", "loss", "sft"]]
    about = {"run": kept.get("label", path.parent.name), "seed": kept.get("seed", path.parent.parent.name.removeprefix("seed"))}
    return frame.assign(**about, smoothed=frame["sft"].ewm(alpha=0.1).mean())


def _plain(frame: _Frame) -> _Frame:
    """The frame with dollars that matplotlib does not take for formulas."""
    return pd.DataFrame(frame).map(lambda value: value.replace("$", r"\$") if isinstance(value, str) else value)
