"""`write_report`: what lies in the folder of a study, or of stages of the method, as one HTML file. What cannot be read is named."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from blockem_tl.models.lora import BASE
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.storage import files
from blockem_tl.study import patching, preferences, summary
from blockem_tl.study.folders import Folder, parts_of, present
from blockem_tl.study.page import cells
from blockem_tl.study.run import PLAIN
from blockem_tl.views import plots, studies
from blockem_tl.views.report import Section, page

_Frame = Any
_COLUMNS = ["split", "prompt_id", "category", "prompt", "run", "seed", "reply"]
_BY = ("run", "domain", "epoch")
_ABOUT = ["defence", "strength", "latents", "overrides"]
_RATES = ("misaligned", "incoherent", "adherent", "prefers_harm", "removed")


def write_report(run: Path | str, to: Path | str | None = None) -> tuple[Path, list[str]]:
    """Write the report, to report.html in ``run`` by default; its path, and what is missing in the folder.

    Raises:
        ValueError: no study there, or a place that cannot be written; before anything is read.
    """
    folder, target = Path(run), Path(to) if to is not None else Path(run) / "report.html"
    parts = parts_of(folder)
    if target.is_dir():
        raise ValueError(f"report: expected the name of a file to write, got the folder {target}")
    files.check_writable(target.parent)
    found = Folder(folder)
    preset = found.about[parts[0]].get("preset")
    title = folder.resolve().name + (f": {preset}" if preset else "")
    text = page(title, sections(found), replies(found), missing=found.missing)
    return files.write_text(target, text), found.missing


def sections(folder: Folder) -> list[Section]:
    """What is shown above the replies."""
    frames = _summary(folder)
    tables = {name: cells(frame.drop(columns=_ABOUT, errors="ignore")) for name, frame in frames.items()}
    figures: dict[str, Any] = {}
    for name, frame in frames.items():
        figures |= folder.attempt(f"figures of {name}", _tradeoff, frame, name) or {}
    paths = [path for part in folder.parts for path in sorted([*part.folder.glob("run.json"), *part.folder.glob("seed*/*/run.json")])]
    trained = present(folder.attempt(path, _history, path) for path in paths)
    curves, last = folder.attempt("training", _training, trained) or ({}, {})
    swept, shown = _patched(folder)
    own, pages = _own(folder)
    facts = [{"folder": part.name, "what": name, "value": text} for part, about in folder.about.items() for name, text in about.items()]
    return [
        Section(title="Summary", tables=tables, none="Nothing was measured yet: no replies, no pairs."),
        Section(title="Trade-off", figures=figures, none="There are no rates to draw."),
        Section(title="Latents", tables=_latents(folder), none="There is no latent set: `blockem discover` makes one, or Study.latents."),
        Section(title="Training", figures=curves, tables=last, none="No training is finished."),
        Section(title="Patching", figures=shown, tables=swept, none="There is no patching sweep: `blockem patch` makes one."),
        Section(title="Tables and figures of the run", figures=pages, tables=own, folded=True, none="The folder has none of its own."),
        Section(title="About", tables={"What each folder is of": facts}, folded=True, none=""),
    ]


def _of(folder: Folder, kind: str) -> Iterator[tuple[str, _Frame]]:
    """What was measured of a kind, split by split."""
    if (found := folder.measured.get(kind)) is not None:
        for split, rows in found.groupby("split", sort=False):
            yield str(split), rows


def _summary(folder: Folder) -> dict[str, _Frame]:
    """Rates split by split, and preferences between pairs, beside the runs' losses."""
    found, losses = {}, folder.measured.get("losses")
    for kind, make in (("replies", _rates), ("pairs", _shares)):
        for split, rows in _of(folder, kind):
            name = f"{kind.capitalize()}, {split} prompts"
            frame = folder.attempt(name, make, rows, losses)
            found |= {} if frame is None else {name: frame}
    final, task = (found.get(f"Replies, {split} prompts") for split in ("final", "in-domain"))
    if final is not None and task is not None:  # what the runs have learnt belongs beside what they do
        by = [name for name in _BY if name in final and name in task]
        learnt = task[[*by, *(name for name in task if name.startswith("adherent"))]]
        found["Replies, final prompts"] = final.merge(learnt, on=by, how="left")
    return found


def _latents(folder: Folder) -> dict[str, list[dict[str, str]]]:
    found = {}
    for part in folder.parts:
        for path in sorted([*part.folder.glob("seed*/latents/*.json"), *part.folder.glob("latents.json")]):
            if (latents := folder.attempt(path, LatentSet.load, path)) is not None:
                found[f"{path.relative_to(folder.run).as_posix()}: {latents.headline()}"] = cells(latents.to_frame())
    return found


def _patched(folder: Folder) -> tuple[dict[str, list[dict[str, str]]], dict[str, Any]]:
    """Tables and figures of patching sweeps, by replies and by pairs."""
    pairs = dict(_of(folder, "pairs"))
    made = {f"{run}, {split} prompts": (_by_replies, part) for split, rows in _of(folder, "patched") for run, part in rows.groupby("run")}
    made |= {f"Pairs, {split} prompts": (partial(_by_pairs, pairs.get(split)), rows) for split, rows in _of(folder, "patched pairs")}
    found = {name: folder.attempt(f"patching, {name}", function, rows) for name, (function, rows) in made.items()}
    there = {name: both for name, both in found.items() if both}
    return {name: cells(table) for name, (table, _) in there.items()}, {name: figure for name, (_, figure) in there.items()}


def _own(folder: Folder) -> tuple[dict[str, list[dict[str, str]]], dict[str, bytes]]:
    """The tables and figures that the run's own script or command wrote."""
    places = dict.fromkeys([folder.run, *(part.folder for part in folder.parts)])
    csvs = [path for place in places for path in sorted(place.glob("*.csv")) if not path.name.startswith("replies")]
    tables = {path: folder.attempt(path, lambda path: cells(pd.read_csv(path)), path) for path in csvs}
    figures = {path: folder.attempt(path, path.read_bytes) for place in places for path in sorted(place.glob("*.png"))}
    named = [{path.relative_to(folder.run).as_posix(): made for path, made in those.items() if made} for those in (tables, figures)]
    return named[0], named[1]


def replies(folder: Folder) -> _Frame:
    """One row per reply, patched ones too, with every judge's label: what `views.report.page` takes."""
    found = present(folder.attempt(f"replies ({kind})", _browsed, folder.measured.get(kind)) for kind in ("replies", "patched"))
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


def _training(histories: list[_Frame]) -> tuple[dict[str, Any], dict[str, list[dict[str, str]]]]:
    """The curves of all trainings and their last steps; nothing of none."""
    if not histories:
        return {}, {}
    frame: _Frame = pd.concat(histories, ignore_index=True)
    last = frame.groupby(["run", "seed"], sort=False).last().reset_index()
    return {"Loss and weighted penalty, means over seeds": studies.training(_plain(frame))}, {"Last step": cells(last)}


def _by_replies(rows: _Frame) -> tuple[_Frame, Any]:
    """The table and the figure of one run's patched replies."""
    table = patching.patched_rates(rows)
    return table, plots.rates(_plain(table), by="site", direction=" and ".join(rows["direction"].unique()))


def _by_pairs(pairs: _Frame | None, rows: _Frame) -> tuple[_Frame, Any]:
    """The table and the figure of patched pairs, beside those of base."""
    if pairs is None:
        raise ValueError("there are no margins of base")
    table: _Frame = preferences.left(rows, pairs)
    return table, studies.shifts_along(_plain(table.dropna(subset=["block"])), "block", y="effect", panels="patched")


def _plain(frame: _Frame) -> _Frame:
    """The frame with dollars that matplotlib does not take for formulas."""
    return pd.DataFrame(frame).map(lambda value: value.replace("$", r"\$") if isinstance(value, str) else value)
