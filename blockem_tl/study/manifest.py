"""What a folder is of, in a file of its own: another thing is refused there, naming what differs. Beside it, on what it was made."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from blockem_tl.storage import files, machine
from blockem_tl.study.setting import Setting
from blockem_tl.training.identity import differences

_NO_MATTER = ("name", "needs", "requires", "caution", "lambdas", "kl_weights", "inoculations", "unaligned", "domain",
              "training.seed", "training.micro_batch_size", "training.gradient_checkpointing",
              "discovery.batch_size", "discovery.smallest_wave")  # fmt: skip


PRESET, MACHINES = "preset", "made on"
"""Entries that another run need not share: the preset's name, and each machine that worked here, with its versions."""
DIGEST = "digest of "
"""How the names of entries begin that tell data apart by their contents: "digest of core"."""


def of_setting(setting: Setting, *, judged: bool = True) -> dict[str, str]:
    """The preset's fields that a result depends on, the narrow task and, if replies are judged, the judges; as text by name."""
    preset = {name: text for name, text in flat(asdict(setting.preset)).items() if not name.startswith(_NO_MATTER)}
    judges = {f"judge {name}": judge.name for name, judge in setting.judges.items()} if judged else {}
    return {"domain": setting.domain, **preset, **judges}


def claim(folder: Path, name: str, mine: Mapping[str, str], *, preset: str) -> None:
    """Write what the folder is of into its file ``name`` ("study.json"), with the preset's name and the machines that worked here.

    Raises:
        ValueError: it is of something else, or holds other files and no such file.
    """
    path, kind = files.check_writable(folder) / name, Path(name).stem
    others = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    if others and not path.is_file():
        raise ValueError(f"{folder} holds {sorted(others)[:3]} and no {name}, so it is no {kind}: choose another folder")
    kept = read(path) if path.is_file() else {}
    if kept and (changed := differences(*believed(compared(kept), mine))):
        raise ValueError(f"{folder} is another {kind}: {'; '.join(changed)}. Choose another folder")
    machines, here = list(kept.get(MACHINES, [])), machine.described()
    files.write_json(path, {**mine, PRESET: preset, MACHINES: machines if here in machines else [*machines, here]})


def claim_work(
    path: Path,
    what: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    begun: bool,
    digests: Mapping[str, str] | None = None,
) -> None:
    """Write down by which function and with which options work is done, but for options that change no result.

    begun: whether some of its results are there; until then options may still change.  digests: of what it reads, see `believed`.  An
    option by seed, a mapping of whole numbers, is compared for the seeds on both sides: a study may get more of them, or be of fewer.

    Raises:
        ValueError: there are results by another function or with other options.
    """
    inner = function.func if isinstance(function, partial) else function
    counting = {name: value for name, value in options.items() if f"discovery.{name}" not in _NO_MATTER}
    mine = {"function": str(getattr(inner, "__qualname__", type(inner).__name__)), **flat(counting), **(digests or {})}
    there = files.read_json(path) if path.is_file() else {}
    if begun and there:
        by_seed = tuple(f"{name}." for name, value in counting.items() if isinstance(value, Mapping) and all(type(k) is int for k in value))
        mine |= {name: text for name, text in there.items() if name.startswith(by_seed) and name not in mine}
        known = {name: text for name, text in mine.items() if name.startswith(by_seed)} | there
        if changed := differences(*believed(known, mine)):
            raise ValueError(f"{what} was done otherwise: {'; '.join(changed)}. Give it another name")
    if there != mine:
        files.write_json(path, mine)


def believed(kept: Mapping[str, str], now: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Both, with the digests that one side lacks taken over: work may be older than they are, or be looked at where the data are not."""
    digests = {name: text for name, text in {**now, **kept}.items() if name.startswith(DIGEST)}
    return {**digests, **kept}, {**digests, **now}


def read(path: Path) -> dict[str, Any]:
    """The contents of a manifest. Raises ValueError if it is none."""
    found = files.read_json(path)
    machines = found.get(MACHINES, []) if isinstance(found, dict) else None
    if not isinstance(machines, list) or not all(isinstance(one, dict) for one in machines):
        raise ValueError(f"{path}: expected what the folder is of, as an object of texts: the file is broken, restore it from a copy")
    return found


def compared(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The entries that another run has to share."""
    return {name: text for name, text in manifest.items() if name not in (PRESET, MACHINES)}


def flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields as text, by their path."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            plain = value if not isinstance(value, float) or math.isfinite(value) else str(value)
            found[prefix + str(name)] = json.dumps(plain, default=str) if not isinstance(plain, str) else plain
    return found
